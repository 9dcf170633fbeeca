"""torch and the devices it computes on: what `auto` stands for, GPUs, NVIDIA's driver. Needs a torch that imports."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from typing import Any

import torch

from ..sam.device import accelerates_bfloat16, resolve_device, resolve_precision

DRIVER_SECONDS = 20.0
"""Time that nvidia-smi may take; it hangs where a GPU is broken."""


def torch_build() -> dict[str, Any]:
    """Return the build of torch.

    Returns:
        `version`; `cuda` and `hip`, the versions it was built for, or None; `cudnn`, its number or None;
        `cuda_usable`; `cuda_warning`, torch's words on why not, or None; `mps` (True on Apple's GPUs, which no
        command uses); `threads` of one process on the CPU.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    words = " ".join(" ".join(str(warning.message).split()) for warning in caught)
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if usable else None,
        "cuda_usable": usable,
        "cuda_warning": words or None,
        "mps": torch.backends.mps.is_available(),
        "threads": torch.get_num_threads(),
    }


def default_device() -> dict[str, str]:
    """Return `device` and `precision`, which `--device auto --precision auto` stand for, and `why`."""
    device = resolve_device("auto")
    return {
        "device": str(device),
        "precision": resolve_precision("auto", device),
        "why": f"{_device_reason(device)}; {_precision_reason(device)}",
    }


def gpus() -> list[dict[str, Any]]:
    """Return torch's CUDA devices in order: `device`, `name`, `memory` and `free` in bytes, `capability`, `bfloat16`
    (True if the hardware computes in it); `error` instead of `free` if the device can't be used."""
    if not torch.cuda.is_available():
        return []
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> dict[str, Any]:
    device = torch.device("cuda", index)
    found = torch.cuda.get_device_properties(device)
    free, error = None, None
    try:
        free = torch.cuda.mem_get_info(device)[0]
    except RuntimeError as failure:  # no memory for a context, another process's exclusive mode, a broken GPU
        error = str(failure).strip().splitlines()[0]
    return {
        "device": str(device),
        "name": found.name,
        "memory": found.total_memory,
        "free": free,
        "capability": f"{found.major}.{found.minor}",
        "bfloat16": accelerates_bfloat16(device),
        "error": error,
    }


def nvidia_driver() -> dict[str, Any] | None:
    """Ask nvidia-smi for the GPUs that NVIDIA's driver knows.

    Returns:
        `version` of the driver, `gpus` (their names), and `error`, its message if it fails; None without nvidia-smi.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"version": None, "gpus": [], "error": f"no answer within {DRIVER_SECONDS:.0f} seconds"}
    except OSError as failure:
        return {"version": None, "gpus": [], "error": failure.strerror or str(failure)}
    rows = [line.partition(", ") for line in done.stdout.splitlines() if ", " in line]
    failed = done.returncode or not rows
    words = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
    return {
        "version": rows[0][0] if rows and not failed else None,
        "gpus": [] if failed else [name for _, _, name in rows],
        "error": words if failed else None,
    }


def _device_reason(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} is the first CUDA device"
    return "torch has no CUDA device here"


def _precision_reason(device: torch.device) -> str:
    fast = accelerates_bfloat16(device)
    if device.type == "cuda":
        return "it computes in bfloat16" if fast else "it can only emulate bfloat16"
    return "this CPU has AMX or AVX-512 bf16" if fast else "this CPU has neither AMX nor AVX-512 bf16"
