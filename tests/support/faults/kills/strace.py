"""strace on a process of the suite: record its system calls, and kill it or fail a call at one of them."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

KILL = "kill"

CALLS = (
    "openat", "mkdir", "write", "writev", "pwrite64", "pwritev", "pwritev2", "fsync", "fdatasync", "ftruncate",
    "flock", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "symlink", "symlinkat", "link",
    "linkat", "fallocate", "copy_file_range", "sendfile", "chmod", "fchmod",
)  # fmt: skip
"""System calls that change, open or lock files."""

WRITES = ("write", "pwrite64", "pwritev", "pwritev2")
SYNCS = ("fsync", "fdatasync")
RENAMES = ("rename", "renameat", "renameat2")
UNLINKS = ("unlink", "unlinkat", "rmdir")


@dataclass(frozen=True)
class Injection:
    """Fault at the `ordinal`-th system call of a name, counted from 1 in each thread.

    `effect` is KILL, a SIGKILL before the call is done, or the name of the error that the call fails with.
    """

    call: str
    ordinal: int
    effect: str = KILL

    @property
    def name(self) -> str:
        """Name in the fault log."""
        return self.call if self.effect == KILL else f"{self.call}:{self.effect}"

    def argument(self) -> str:
        """Return the argument of strace's -e."""
        effect = "signal=SIGKILL" if self.effect == KILL else f"error={self.effect}"
        return f"inject={self.call}:{effect}:when={self.ordinal}"


class Tracer:
    """strace attached to a process and its threads: call it with the pid, then `end` when the process has ended."""

    def __init__(self, log: Path, injection: Injection | None = None) -> None:
        self.log = log
        self._injection = injection
        self._strace: subprocess.Popen[bytes] | None = None

    def __call__(self, pid: int) -> None:
        options = ["-f", "-y", "-ttt", "-s", "64", "-o", str(self.log), "-e", f"trace={','.join(CALLS)}"]
        if self._injection is not None:
            options += ["-e", self._injection.argument()]
        self._strace = subprocess.Popen(
            ["strace", *options, "-p", str(pid)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while not is_traced(pid):
            if self._strace.poll() is not None:
                assert self._strace.stderr is not None
                raise RuntimeError(f"strace can't attach to {pid}: {self._strace.stderr.read().decode()}")
            time.sleep(0.002)

    def end(self) -> None:
        """Wait until strace has written the whole log."""
        assert self._strace is not None
        self._strace.communicate(timeout=60)


def is_traced(pid: int | str) -> bool:
    """Return True if the process is traced, or has ended."""
    try:
        return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
