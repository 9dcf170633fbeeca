"""Memory that starts at a page, which reads past the system's cache need."""

from __future__ import annotations

import math
import mmap
import threading

import numpy as np

from .layout import ALIGNMENT


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """An uninitialised array, C-contiguous, whose first byte lies at a multiple of `ALIGNMENT`."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def is_aligned(array: np.ndarray) -> bool:
    """Whether an array's first byte lies at a multiple of `ALIGNMENT`."""
    return array.ctypes.data % ALIGNMENT == 0


class Scratch(threading.local):
    """Each thread's own page-aligned bytes, kept for the next read."""

    def __init__(self) -> None:
        self._memory: dict[str, mmap.mmap] = {}

    def take(self, use: str, size: int) -> np.ndarray:
        """`size` bytes for one use, uint8; what an earlier call gave for the same use is overwritten."""
        if len(self._memory.get(use, b"")) < size:
            self._memory[use] = mmap.mmap(-1, math.ceil(size / ALIGNMENT) * ALIGNMENT)
        return np.frombuffer(self._memory[use], np.uint8)[:size]
