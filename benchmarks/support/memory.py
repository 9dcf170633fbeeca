"""Memory of processes, as Linux and glibc count it."""

from __future__ import annotations

import ctypes
from pathlib import Path


def peak_resident(pid: int | str = "self") -> int:
    """The most bytes that were resident since the process began, or since `forget_peak`.

    (getrusage would count what the parent had, too.)
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def forget_peak(pid: int | str = "self") -> None:
    """Let `peak_resident` begin anew, from what is resident now. Source: proc_pid_clear_refs(5)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS.split()]


def allocated() -> int | None:
    """Bytes that this process has asked malloc for and not freed yet; None without glibc 2.33 or newer.

    What is resident beyond them is free memory that the allocator keeps, and files. Source: mallinfo(3).
    """
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)
