"""Shard files being read: indexes, and rows by number, through the page cache or past it, each verified.

A row is one positioned read: zarr-python's fancy indexing on sharded arrays is a hundred times slower (zarr-python
issue 3829). It is returned only if three checksums agree: that of its bytes, the one stored behind them, and the
manifest's. The first two prove that the bytes are intact, the third that they belong to this row.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.durable import explain_os_errors
from ..common.errors import REPAIR_SHARDS, StoreDamaged, StoreError
from .checksum import CHECKSUM_BYTES, crc32c
from .layout import ALIGNMENT, EMPTY, ArrayLayout, rows_of, shard_of
from .manifest import Manifest
from .quantize import dequantize
from .spec import StoreSpec

O_DIRECT = getattr(os, "O_DIRECT", 0)
"""Flag of `open` for reading past the page cache; 0 on systems without it."""

OPEN_SHARDS = 128
"""Most shards whose files are held open; the usual limit of a process is 1024 descriptors."""

READS_IN_FLIGHT = 4
"""Rows of a batch that are read at the same time: a disk serves concurrent requests faster than sequential ones."""

CACHED_SHARE = 0.5
"""Share of the machine's memory. A larger store is read past the page cache, which could not keep it until the next
epoch, while copying into the cache takes half of the reading time."""


@dataclass(frozen=True)
class StoredBatch:
    """B rows as stored."""

    values: np.ndarray
    """(B, 256, g, g) in the store's dtype."""
    scales: np.ndarray | None
    """float32 (B, 256) in int8 stores: the factor of each image and channel."""

    def to_float32(self) -> np.ndarray:
        """Return the embeddings as float32 (B, 256, g, g)."""
        if self.scales is None:
            return self.values.astype(np.float32)
        return dequantize(self.values, self.scales)


class DirectReader:
    """Reader of one store's rows by number. Safe to use from several threads; opens nothing before the first read.

    Args:
        path: path of the store.
        spec: description of the store.
        manifest: manifest of the store, which has the rows' checksums.
        direct: read past the page cache; None to decide by the store's size and the machine's memory.
    """

    def __init__(
        self, path: Path, spec: StoreSpec, manifest: Manifest, *, direct: bool | None = None
    ) -> None:
        self._path = path
        self._spec = spec
        self._layouts = spec.layouts
        self._manifest = manifest
        self._direct = direct
        self._mutex = threading.Lock()
        self._shards: OrderedDict[int, tuple[ShardFile, ...]] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None

    def read(self, rows: Sequence[int], out: StoredBatch | None = None) -> StoredBatch:
        """Read rows in the order given, each verified.

        Args:
            rows: numbers of B done rows; any of them may be repeated.
            out: batch to fill, as `empty_batch(B)` makes it; None for a new one.

        Returns:
            `out`, or the new batch: values (B, 256, g, g) in the store's dtype, in int8 stores with scales (B, 256).

        Raises:
            StoreDamaged: a row is not as committed; the message names its file, number and key.
            StoreError: a row isn't done, or can't be read.
            ValueError: `out` has other shapes or dtypes, or is not contiguous and writable.
        """
        batch = self.empty_batch(len(rows)) if out is None else out
        arrays = self._arrays(batch, len(rows))
        places = [(int(row), [array[place] for array in arrays]) for place, row in enumerate(rows)]
        if len(places) == 1:
            self._read_row(*places[0])
        elif places:
            futures = [self._threads().submit(self._read_row, row, items) for row, items in places]
            wait(futures)  # all of them, so that no thread writes into the batch after the return
            for future in futures:
                future.result()
        return batch

    def empty_batch(self, rows: int) -> StoredBatch:
        """Return an uninitialised batch of `rows` rows, page-aligned: reads past the page cache need no copy."""
        arrays = [aligned_empty((rows, *layout.item_shape), layout.dtype) for layout in self._layouts]
        return StoredBatch(arrays[0], arrays[1] if len(arrays) > 1 else None)

    def close(self) -> None:
        """Close files and threads."""
        with self._mutex:
            self._shards.clear()
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None

    def _arrays(self, batch: StoredBatch, rows: int) -> list[np.ndarray]:
        """Return a batch's arrays, one for each of the store's; ValueError unless they hold `rows` rows."""
        arrays = [array for array in (batch.values, batch.scales) if array is not None]
        wanted = [((rows, *layout.item_shape), layout.dtype) for layout in self._layouts]
        if [(array.shape, array.dtype) for array in arrays] != wanted or not all(
            array.flags.c_contiguous and array.flags.writeable for array in arrays
        ):
            found = [(array.shape, str(array.dtype)) for array in arrays]
            raise ValueError(f"a batch of {rows} rows of this store is {wanted}, contiguous, not {found}")
        return arrays

    def _threads(self) -> ThreadPoolExecutor:
        with self._mutex:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(READS_IN_FLIGHT, thread_name_prefix="read")
            return self._pool

    def _reads_past_cache(self) -> bool:
        """Return the setting given, else True if the page cache can't keep the store until the next epoch."""
        if self._direct is None:
            rows = self._manifest.row_count()
            size = sum(layout.stride for layout in self._layouts) * rows
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            self._direct = size > CACHED_SHARE * memory
        return self._direct

    def forget(self, shard: int) -> None:
        """Close a shard's files after its files or listing have changed."""
        with self._mutex:
            self._shards.pop(shard, None)

    def _open(self, shard: int) -> tuple[ShardFile, ...]:
        with self._mutex:
            if shard in self._shards:
                self._shards.move_to_end(shard)
                return self._shards[shard]
            rows = rows_of(shard, self._spec.shard_size, (shard + 1) * self._spec.shard_size)
            listed = self._manifest.checksums(rows)
            if not listed:
                raise StoreError(
                    f"shard {shard} of {self._path} has no committed rows: run precompute, or read committed rows"
                )
            opened = tuple(
                ShardFile(
                    self._path / layout.name / layout.file_name(shard),
                    layout,
                    {row: int(pair[place] or 0) for row, pair in listed.items()},
                    direct=self._reads_past_cache(),
                )
                for place, layout in enumerate(self._layouts)
            )
            self._shards[shard] = opened
            while len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
            return opened

    def _read_row(self, row: int, items: list[np.ndarray]) -> None:
        try:
            self._read_items(row, items)
        except StoreError:
            # A writer may have committed the shard again since it was opened, or may be committing it now.
            self.forget(shard_of(row, self._spec.shard_size))
            self._read_items(row, items)

    def _read_items(self, row: int, items: list[np.ndarray]) -> None:
        shards = self._open(shard_of(row, self._spec.shard_size))
        for shard, layout, item in zip(shards, self._layouts, items, strict=True):
            self._read_item(shard, layout, row, item)

    def _read_item(self, shard: ShardFile, layout: ArrayLayout, row: int, out: np.ndarray) -> None:
        if row not in shard.checksums:
            raise StoreError(f"row {row} of {self._path} is not done (its image is pending or failed)")
        offset, length = shard.index[row % layout.shard_size]
        if offset == EMPTY or length != layout.payload_bytes + CHECKSUM_BYTES:
            raise self._damage(shard, row, "the file's index does not list the row")
        payload = out.reshape(-1).view(np.uint8)
        with explain_os_errors(shard.path):
            stored = shard.read(int(offset), payload)
        if stored is None:
            raise self._damage(shard, row, "the file is too short")
        computed = crc32c(payload)
        if computed != stored:
            raise self._damage(shard, row, "the checksum stored behind the row is not that of its bytes")
        if computed != shard.checksums[row]:
            raise self._damage(
                shard, row, "the bytes are intact, but not those that were committed for this row"
            )

    def _damage(self, shard: ShardFile, row: int, fact: str) -> StoreDamaged:
        key = self._manifest.records(None, range(row, row + 1))[0].key
        return StoreDamaged(f"{shard.path}, row {row} ({key!r}): {fact}; {REPAIR_SHARDS}")


class ShardFile:
    """Shard file of one array, open for reading: its index, and the bytes of rows.

    Args:
        path: path of the file.
        layout: layout of the array.
        checksums: the manifest's crc32c of every done row, by row.
        direct: read rows past the page cache if the file system and the layout (rows of whole pages) allow it.

    Raises:
        StoreDamaged: the file is missing or its index is damaged.
        StoreError: it can't be opened.
    """

    def __init__(self, path: Path, layout: ArrayLayout, checksums: dict[int, int], *, direct: bool) -> None:
        self.path = path
        self.checksums = checksums
        with explain_os_errors(path):
            try:
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise StoreDamaged(
                    f"{path} is missing, though the manifest lists it; {REPAIR_SHARDS}"
                ) from error
            size = os.fstat(self._descriptor).st_size
            tail = os.pread(self._descriptor, layout.index_bytes, max(size - layout.index_bytes, 0))
        try:
            self.index = layout.decode_index(tail)
        except ValueError as error:
            raise StoreDamaged(f"{path} ({size} bytes): {error}; {REPAIR_SHARDS}") from error
        self.direct = direct and layout.payload_bytes % ALIGNMENT == 0 and self._set_direct(True)

    def read(self, offset: int, payload: np.ndarray) -> int | None:
        """Read one row's bytes.

        Args:
            offset: byte of the file at which the row begins.
            payload: uint8 (bytes of a row,), filled with the row.

        Returns:
            The checksum stored behind the row; None if the file is too short.

        Raises:
            OSError: as the system raises it.
        """
        if self.direct:
            try:
                return self._read_past_cache(offset, payload)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            # The file system accepted O_DIRECT, but refuses to read so; or the end of a short file.
            self.direct = False
            self._set_direct(False)
        return read_chunk(self._descriptor, offset, payload)

    def _read_past_cache(self, offset: int, payload: np.ndarray) -> int | None:
        """Read a row as `read` does, in whole pages: the page with the checksum goes to a buffer of its own."""
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
        """Switch reading past the page cache on or off; return True if it is on now."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~O_DIRECT
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | O_DIRECT if on else flags)
        except OSError:
            return False  # not on this file system
        return on and O_DIRECT != 0

    def __del__(self) -> None:
        # No thread reads from it any more. There is no descriptor if opening failed.
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def read_chunk(descriptor: int, offset: int, payload: np.ndarray) -> int | None:
    """Read one row of an open shard file, through the page cache.

    Args:
        descriptor: open file descriptor.
        offset: byte of the file at which the row begins.
        payload: uint8 (bytes of a row,), filled with the row.

    Returns:
        The checksum stored behind the row; None if the file is too short.

    Raises:
        OSError: as the system raises it.
    """
    behind = bytearray(CHECKSUM_BYTES)
    count = read_fully(descriptor, [payload.data, memoryview(behind)], offset)
    return int.from_bytes(behind, "little") if count == len(payload) + CHECKSUM_BYTES else None


def read_fully(descriptor: int, buffers: list[memoryview], offset: int) -> int:
    """Call preadv until the buffers are full or the file ends: one call may read less.

    Args:
        descriptor: open file descriptor.
        buffers: memory to fill, in order; the list is consumed.
        offset: byte of the file at which to begin.

    Returns:
        Number of bytes read.

    Raises:
        OSError: as the system raises it.
    """
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


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """Return an uninitialised C-contiguous array whose address is a multiple of `ALIGNMENT`.

    Reads past the page cache need such memory.

    Args:
        shape: shape of the array.
        dtype: type of its elements.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def is_aligned(array: np.ndarray) -> bool:
    """Return True if an array's address is a multiple of `ALIGNMENT`."""
    return array.ctypes.data % ALIGNMENT == 0


class Scratch(threading.local):
    """Page-aligned buffers of each thread, kept for its next read."""

    def __init__(self) -> None:
        self._memory: dict[str, mmap.mmap] = {}

    def take(self, use: str, size: int) -> np.ndarray:
        """Return this thread's buffer for one use.

        Args:
            use: name of the use; a buffer overlaps the one that an earlier call with the same name returned.
            size: length in bytes.

        Returns:
            uint8 (size,), page-aligned, with any content.
        """
        if len(self._memory.get(use, b"")) < size:
            self._memory[use] = mmap.mmap(-1, math.ceil(size / ALIGNMENT) * ALIGNMENT)
        return np.frombuffer(self._memory[use], np.uint8)[:size]


_scratch = Scratch()
