"""A shard file of one array, open for reading: its index, and rows read through the system's cache or past it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import numpy as np

from .buffers import Scratch, is_aligned
from .durable import explained
from .errors import TAKE_OUT, StoreDamaged
from .layout import ALIGNMENT, CHECKSUM_BYTES, ArrayLayout

O_DIRECT = getattr(os, "O_DIRECT", 0)
"""0 where the system has none."""

_scratch = Scratch()


class ShardFile:
    """Raises StoreDamaged when the file is missing or its index is damaged, StoreError when it can't be opened.

    With `direct`, rows are read past the system's cache where the file system and the layout allow it (whole pages);
    else through it. `checksums` are the manifest's, by row.
    """

    def __init__(self, path: Path, layout: ArrayLayout, checksums: dict[int, int], *, direct: bool) -> None:
        self.path = path
        self.checksums = checksums
        with explained(path):
            try:
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise StoreDamaged(f"{path} is missing, though the manifest lists it; {TAKE_OUT}") from error
            size = os.fstat(self._descriptor).st_size
            tail = os.pread(self._descriptor, layout.index_bytes, max(size - layout.index_bytes, 0))
        try:
            self.index = layout.decode_index(tail)
        except ValueError as error:
            raise StoreDamaged(f"{path} ({size} bytes): {error}; {TAKE_OUT}") from error
        self.direct = direct and layout.payload_bytes % ALIGNMENT == 0 and self._set_direct(True)

    def read(self, offset: int, payload: np.ndarray) -> int | None:
        """Fill `payload` (uint8) with the bytes at `offset`; the checksum stored behind them, or None when the file
        is too short. OSError as the system raises it."""
        if self.direct:
            try:
                return self._read_past_cache(offset, payload)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            # A file system that agreed to read past its cache and then didn't, or the end of a short file.
            self.direct = False
            self._set_direct(False)
        return read_chunk(self._descriptor, offset, payload)

    def _read_past_cache(self, offset: int, payload: np.ndarray) -> int | None:
        """As `read`, in whole pages: the checksum's page goes to a buffer of its own."""
        aligned = is_aligned(payload)
        place = payload if aligned else _scratch.take("row", len(payload))
        page = _scratch.take("checksum", ALIGNMENT)
        count = read_fully(self._descriptor, [place.data, page.data], offset)
        if count < len(payload) + CHECKSUM_BYTES:
            return None
        if not aligned:
            payload[:] = place
        return int.from_bytes(page[:CHECKSUM_BYTES].tobytes(), "little")

    def _set_direct(self, on: bool) -> bool:
        """Switch the open file; whether it reads past the cache now."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~O_DIRECT
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | O_DIRECT if on else flags)
        except OSError:
            return False  # not on this file system
        return on and O_DIRECT != 0

    def __del__(self) -> None:
        # By now every thread that read from it has let go. There is none when opening failed.
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def read_chunk(descriptor: int, offset: int, payload: np.ndarray) -> int | None:
    """Fill `payload` (uint8) with the bytes at `offset` of an open file; the checksum stored behind them, or None
    when the file is too short."""
    behind = bytearray(CHECKSUM_BYTES)
    count = read_fully(descriptor, [payload.data, memoryview(behind)], offset)
    return int.from_bytes(behind, "little") if count == len(payload) + CHECKSUM_BYTES else None


def read_fully(descriptor: int, buffers: list[memoryview], offset: int) -> int:
    """preadv until the buffers are full or the file ends; the number of bytes read."""
    total = 0
    while buffers:
        count = os.preadv(descriptor, buffers, offset + total)
        if count == 0:
            break
        total += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if buffers and count:
            buffers[0] = buffers[0][count:]
    return total
