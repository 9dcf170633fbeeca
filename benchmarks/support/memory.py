"""Memory of processes, as Linux and glibc count it."""

from __future__ import annotations

import ctypes
from pathlib import Path


def peak_resident(pid: int | str = "self") -> int:
    """Return the peak resident bytes of a process since it began, or since `forget_peak`.

    getrusage would include the memory of the parent before the fork.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def forget_peak(pid: int | str = "self") -> None:
    """Reset the peak to what is resident now. Source: proc_pid_clear_refs(5)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS.split()]


def allocated() -> int | None:
    """Return the bytes that this process holds from malloc; None without glibc 2.33 or newer.

    Resident memory beyond them is free memory kept by the allocator, and mapped files. Source: mallinfo(3).
    """
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)
