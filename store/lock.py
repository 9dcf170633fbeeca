"""Writer's lock: one writer at a time, by a held flock and a file that names its owner."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from ..common.durable import explain_os_errors, write_atomic
from ..common.errors import StoreLocked

_NETWORK_FILE_SYSTEMS = (
    "nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "ceph", "9p", "afs", "glusterfs", "fuse", "pvfs", "wekafs",
)  # fmt: skip


class WriterLock:
    """Lock of a store's writer, held from `acquire` to `release`; the kernel releases it when its process dies.

    The owner file (host, pid) lets a refusal name the live writer. On network file systems, where flock may not
    reach other hosts, an owner file left by another host counts as a held lock.

    Args:
        folder: folder of the store's private files (`layout.PRIVATE`).
    """

    def __init__(self, folder: Path) -> None:
        self._lock_path = folder / "writer.lock"
        self._owner_path = folder / "writer.json"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            StoreLocked: another process holds it, or may hold it from another host; the message names the process.
            StoreError: the lock file can't be made.
        """
        with explain_os_errors(self._lock_path):
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._hold(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def live_owner(self) -> dict[str, Any] | None:
        """Return `host` and `pid` (None if unknown) of the process that holds the lock, or may hold it from another
        host; None if no process does. Needs no write access."""
        with explain_os_errors(self._lock_path):
            try:
                descriptor = os.open(self._lock_path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                held = False
            except BlockingIOError:
                held = True
            finally:
                os.close(descriptor)
        owner = self._owner()
        if not held and not self._may_be_held_elsewhere(owner):
            return None
        return {"host": owner.get("host"), "pid": owner.get("pid")}

    def _hold(self, descriptor: int) -> None:
        with explain_os_errors(self._lock_path):
            if not _flock_soon(descriptor):
                raise StoreLocked(
                    f"{self._describe(self._owner())} is writing to this store: wait for it, or stop it"
                )
        owner = self._owner()
        if self._may_be_held_elsewhere(owner):
            raise StoreLocked(
                f"{self._describe(owner)} may be writing to this store (locks may not work across hosts on "
                f"this file system): if that process has ended, delete {self._owner_path}"
            )
        with explain_os_errors(self._owner_path):
            mine = {"host": socket.gethostname(), "pid": os.getpid()}
            write_atomic(self._owner_path, json.dumps(mine).encode())

    def forget_owner(self) -> None:
        """Remove the owner file while still holding the lock: before the folder is moved."""
        self._owner_path.unlink(missing_ok=True)

    def release(self) -> None:
        """Release the lock; do nothing if it is not held."""
        if self._descriptor is None:
            return
        self.forget_owner()
        os.close(self._descriptor)
        self._descriptor = None

    def _owner(self) -> dict[str, Any]:
        try:
            owner = json.loads(self._owner_path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _may_be_held_elsewhere(self, owner: dict[str, Any]) -> bool:
        return bool(owner) and owner.get("host") != socket.gethostname() and _on_network(self._owner_path)

    @staticmethod
    def _describe(owner: dict[str, Any]) -> str:
        if not owner:
            return "another process"
        return f"process {owner.get('pid')} on {owner.get('host')}"


def _flock_soon(descriptor: int) -> bool:
    """Take the lock; return False if it stays held. It is tried for a moment, since `live_owner` of another process
    holds it briefly."""
    for wait in (0.01, 0.04, 0.1, 0.2, None):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is not None:
                time.sleep(wait)
        else:
            return True
    return False


def _on_network(path: Path) -> bool:
    """Return True if the file is on a file system that other hosts may share, by /proc/self/mountinfo."""
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
