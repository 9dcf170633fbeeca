"""This machine: system, processor, memory, disks, checkpoints, environment, limits of containers and batch jobs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_VARIABLES = {
    *(
        "CUDA_VISIBLE_DEVICES",
        "MOBILESAM_CACHE",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    ),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    *("TMPDIR", "XDG_CACHE_HOME", "PYTHONPATH", "LD_PRELOAD", "LD_LIBRARY_PATH"),
    *("TERM", "NO_COLOR", "FORCE_COLOR", "HF_HOME", "HF_HUB_OFFLINE"),
}
"""Environment variables that change what mobilesam or a library below it does."""
_FAMILIES = re.compile(
    r"(OMP|KMP|GOMP|MKL|OPENBLAS|TORCH|PYTORCH|CUDA|CUDNN|NCCL|NVIDIA|DASK|MALLOC|SLURM_CPUS)_"
)
"""Beginnings of names of more such variables."""
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def system() -> dict[str, str]:
    """Return names and versions: `system`, `kernel`, `machine` (architecture)."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return {
        "system": name,
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
    }


def python() -> dict[str, Any]:
    """Return `version`, `executable`, and `virtual_environment` (True inside one)."""
    return {
        "version": platform.python_version(),
        "executable": sys.executable,
        "virtual_environment": sys.prefix != sys.base_prefix,
    }


def processor() -> dict[str, Any]:
    """Return the processor and its cores.

    Returns:
        `model`; `logical`, the cores of the machine; `affinity`, those that this process may run on; `limit`, cores'
        worth of time that its cgroups allow, None without a limit; `usable`, the whole cores of both together.
    """
    affinity, limit = len(os.sched_getaffinity(0)), cgroup_limits().cores
    return {
        "model": _model(),
        "logical": os.cpu_count(),
        "affinity": affinity,
        "limit": limit,
        "usable": affinity if limit is None else max(1, min(affinity, int(limit))),
    }


def memory() -> dict[str, Any]:
    """Return `total`, `available`, and `limit` (of this process's cgroups, None without one), in bytes; `total` and
    `available` heed the limit."""
    import psutil

    found, limits = psutil.virtual_memory(), cgroup_limits()
    limit = limits.memory if limits.memory is not None and limits.memory < found.total else None
    available = found.available
    if limit is not None and limits.memory_left is not None:
        available = max(0, min(available, limits.memory_left))
    return {"total": limit or found.total, "available": available, "limit": limit}


def disk(folder: Path) -> dict[str, Any]:
    """Return the room where a folder is, or would be made.

    Args:
        folder: folder; the nearest one above it that exists is measured.

    Returns:
        `folder`, as given; `free` and `total` in bytes; `writable`.
    """
    there = folder.absolute()
    while not os.path.exists(there):  # also where it may not be looked into
        there = there.parent
    usage = shutil.disk_usage(there)
    return {
        "folder": str(folder),
        "free": usage.free,
        "total": usage.total,
        "writable": os.access(there, os.W_OK | os.X_OK),
    }


def checkpoints() -> dict[str, Any]:
    """Return `folder`, that of downloaded checkpoints, and `files`: `name`, `bytes`, `teacher` (None for a file that
    is none's) and `complete` of each. A file's SHA-256 isn't computed; its length is compared."""
    from ..sam.registry import TEACHERS
    from ..sam.weights.download import cache_directory

    folder = cache_directory()
    official = {info.checkpoint.name: info for info in TEACHERS.values() if info.checkpoint is not None}
    files = []
    for path in sorted(folder.iterdir()) if os.access(folder, os.R_OK | os.X_OK) else []:
        if not path.is_file() or path.name.endswith(".part.json"):
            continue
        size, info = path.stat().st_size, official.get(path.name.removesuffix(".part"))
        wanted = info.checkpoint.bytes if info is not None and info.checkpoint is not None else None
        complete = not path.name.endswith(".part") and wanted in (None, size)
        teacher = None if info is None else info.name
        files.append({"name": path.name, "bytes": size, "teacher": teacher, "complete": complete})
    return {"folder": str(folder), "files": files}


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment variables that change what the commands do, without secrets.

    Args:
        variables: the environment; None for this process's.
    """
    found = dict(os.environ if variables is None else variables)
    return {
        name: "(not shown)" if _SECRET.search(name) else _without_password(value)
        for name, value in sorted(found.items())
        if name.upper() in _VARIABLES or _FAMILIES.match(name)
    }


def size_words(number: int) -> str:
    """Return a number of bytes in GB or MB, as words."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def _without_password(value: str) -> str:
    return re.sub(r"(?<=://)[^/@\s]*@", "(not shown)@", value)


def _model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits that cgroups set for this process: those of containers, systemd's units and batch jobs."""

    cores: float | None = None
    """Cores' worth of time; None without a limit."""
    memory: int | None = None
    """Bytes; None without a limit."""
    memory_left: int | None = None
    """Bytes below the limit that are not in use, cached files counted as unused; None without a limit."""


def cgroup_limits(process: Path = Path("/proc/self"), root: Path = Path("/sys/fs/cgroup")) -> Limits:
    """Read the limits of cgroups, of version 1 and 2: the smallest of this process's own group and all above it.

    Args:
        process: folder of the process in /proc.
        root: folder where cgroups are mounted.
    """
    cores, sizes, left = [], [], []
    for group in _groups(process, root):
        if (share := _cores(group)) is not None:
            cores.append(share)
        for limit_file, used_file, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _number(group / limit_file), _number(group / used_file)
            if limit is not None and used is not None:
                sizes.append(limit)
                left.append(limit - used + _statistic(group / "memory.stat", cached))
    return Limits(
        cores=min(cores, default=None), memory=min(sizes, default=None), memory_left=min(left, default=None)
    )


def _groups(process: Path, root: Path) -> Iterator[Path]:
    """Yield the folders of a process's cgroups and of all groups above them.

    Inside a container the path in /proc may be the host's, of which only the mount's root is there.
    """
    try:
        lines = (process / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mounts = (
            [root / controllers, *(root / name for name in controllers.split(","))] if controllers else [root]
        )
        for mount in dict.fromkeys(mounts):
            names = [name for name in path.split("/") if name not in ("", "..")]
            for count in range(len(names), -1, -1):
                group = mount.joinpath(*names[:count])
                if group.is_dir():
                    yield group


def _cores(group: Path) -> float | None:
    """Return the cores' worth of time that one group allows; None without a limit."""
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    quota_us, period_us = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def _number(file: Path) -> int | None:
    """Return the number in a file; None if there is no file, or a word for no limit."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _statistic(file: Path, name: str) -> int:
    with suppress(OSError):
        for line in file.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
