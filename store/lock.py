"""One writer at a time: a held flock, and a file that says whose it is."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from .durable import write_atomic
from .errors import StoreError, StoreLocked

_NETWORK_FILE_SYSTEMS = (
    "nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "ceph", "9p", "afs", "glusterfs", "fuse", "pvfs", "wekafs",
)  # fmt: skip


class WriterLock:
    """Held from `acquire` to `release`; the kernel lets go of it when its process dies, however it dies.

    The owner file (host, pid) exists for people: it names a live writer in the refusal. Where flock may not
    reach other hosts (network file systems), an owner file left by another host is refused too.
    """

    def __init__(self, folder: Path) -> None:
        self._lock_path = folder / "writer.lock"
        self._owner_path = folder / "writer.json"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock or raise StoreLocked, naming who holds it."""
        try:
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(
                f"can't write {self._lock_path}: {error.strerror}; check its permissions"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise StoreLocked(
                f"{self._describe(self._owner())} is writing to this store: wait for it, or stop it"
            ) from None
        owner = self._owner()
        if owner and owner.get("host") != socket.gethostname() and _on_network(self._owner_path):
            os.close(descriptor)
            raise StoreLocked(
                f"{self._describe(owner)} may be writing to this store (a lock need not reach over "
                f"this file system): if that process has ended, delete {self._owner_path}"
            )
        try:
            write_atomic(
                self._owner_path, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
            )
        except OSError as error:
            os.close(descriptor)
            raise StoreError(f"can't write {self._owner_path}: {error.strerror}") from error
        self._descriptor = descriptor

    def release(self) -> None:
        """Let go; harmless when not held."""
        if self._descriptor is None:
            return
        self._owner_path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def _owner(self) -> dict[str, Any]:
        try:
            owner = json.loads(self._owner_path.read_bytes())
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    @staticmethod
    def _describe(owner: dict[str, Any]) -> str:
        if not owner:
            return "another process"
        return f"process {owner.get('pid')} on {owner.get('host')}"


def _on_network(path: Path) -> bool:
    """Whether the file lies on a file system that other hosts may share (by /proc/self/mountinfo)."""
    target = str(path.resolve())
    best, kind = "", ""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return True
    for line in mounts:
        left, _, right = line.partition(" - ")
        mount = left.split()[4].encode().decode("unicode_escape")
        if (target == mount or target.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
            best, kind = mount, right.split()[0]
    return kind.startswith(_NETWORK_FILE_SYSTEMS)
