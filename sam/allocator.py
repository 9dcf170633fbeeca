"""The C library's allocator, told to keep what large tensors leave behind."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process reuse the memory of freed tensors; True where that could be arranged (glibc).

    By default glibc maps every block of more than 32 MB anew and gives it back when it is freed, so that a CPU
    forward or training step at 1024 pixels spends a third of its time on page faults. The process's peak stays
    about what it was, but is held until the process ends. Threads that begin later allocate from the same memory as
    the first one: a thread's own arena is made of pieces of 64 MB, which are mapped anew all the same. So this comes
    before the thread that computes. Source: mallopt(3).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER))
    return all(mallopt(name, value) == 1 for name, value in settings)
