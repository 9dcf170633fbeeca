"""Reading rows straight from the Zarr files: one positioned read each, verified three ways.

zarr-python's fancy indexing on sharded arrays is a hundred times slower (zarr-python issue 3829). A row is
handed out only when the checksum of its bytes, the checksum stored behind them, and the manifest's agree: the
first two prove the bytes, the third that they are this row's.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .durable import explained
from .errors import TAKE_OUT, StoreDamaged, StoreError
from .layout import CHECKSUM_BYTES, EMPTY, ArrayLayout, crc32c, rows_of, shard_of
from .manifest import Manifest
from .quantize import dequantize
from .spec import StoreSpec

OPEN_SHARDS = 128
"""Shard files held open at most; the usual limit of a process is 1024 descriptors."""


@dataclass(frozen=True)
class StoredBatch:
    """Rows as stored: `values` (n, 256, grid, grid) in the store's dtype; `scales` (n, 256) float32 for int8."""

    values: np.ndarray
    scales: np.ndarray | None

    def to_float32(self) -> np.ndarray:
        """The embeddings as float32 (n, 256, grid, grid)."""
        if self.scales is None:
            return self.values.astype(np.float32)
        return dequantize(self.values, self.scales)


class _OpenShard:
    """A shard file of one array, its index, and the manifest's checksums of its rows."""

    def __init__(self, path: Path, layout: ArrayLayout, checksums: dict[int, int]) -> None:
        self.path = path
        self.checksums = checksums
        with explained(path):
            try:
                self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise StoreDamaged(f"{path} is missing, though the manifest lists it; {TAKE_OUT}") from error
            size = os.fstat(self.descriptor).st_size
            tail = os.pread(self.descriptor, layout.index_bytes, max(size - layout.index_bytes, 0))
        try:
            self.index = layout.decode_index(tail)
        except ValueError as error:
            raise StoreDamaged(f"{path} ({size} bytes): {error}; {TAKE_OUT}") from error

    def __del__(self) -> None:
        # By now every thread that read from it has let go. There is none when opening failed.
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class DirectReader:
    """Rows of one store by number. Safe to use from several threads; opens nothing before the first read."""

    def __init__(self, path: Path, spec: StoreSpec, manifest: Manifest) -> None:
        self._path = path
        self._spec = spec
        self._layouts = spec.layouts
        self._manifest = manifest
        self._mutex = threading.Lock()
        self._shards: OrderedDict[int, tuple[_OpenShard, ...]] = OrderedDict()

    def read(self, rows: Sequence[int]) -> StoredBatch:
        """Read rows in the order given. StoreDamaged names the file, row and key of whatever is not as
        committed; StoreError a row that isn't done."""
        arrays = [np.empty((len(rows), *layout.item_shape), layout.dtype) for layout in self._layouts]
        for place, row in enumerate(map(int, rows)):
            items = [array[place] for array in arrays]
            try:
                self._read_row(row, items)
            except StoreError:
                # A writer may have committed the shard anew since it was opened, or been at it just then.
                self.forget(shard_of(row, self._spec.shard_size))
                self._read_row(row, items)
        return StoredBatch(arrays[0], arrays[1] if len(arrays) > 1 else None)

    def forget(self, shard: int) -> None:
        """Let go of a shard whose file or listing has changed."""
        with self._mutex:
            self._shards.pop(shard, None)

    def _open(self, shard: int) -> tuple[_OpenShard, ...]:
        with self._mutex:
            if shard in self._shards:
                self._shards.move_to_end(shard)
                return self._shards[shard]
            rows = rows_of(shard, self._spec.shard_size, (shard + 1) * self._spec.shard_size)
            listed = self._manifest.checksums(rows)
            opened = tuple(
                _OpenShard(
                    self._path / layout.name / layout.file_name(shard),
                    layout,
                    {row: int(pair[place] or 0) for row, pair in listed.items()},
                )
                for place, layout in enumerate(self._layouts)
                if listed
            )
            if not listed:
                raise StoreError(
                    f"shard {shard} of {self._path} has no committed rows: run precompute, or read committed rows"
                )
            self._shards[shard] = opened
            while len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
            return opened

    def _read_row(self, row: int, items: list[np.ndarray]) -> None:
        shards = self._open(shard_of(row, self._spec.shard_size))
        for shard, layout, item in zip(shards, self._layouts, items, strict=True):
            self._read_item(shard, layout, row, item)

    def _read_item(self, shard: _OpenShard, layout: ArrayLayout, row: int, out: np.ndarray) -> None:
        if row not in shard.checksums:
            raise StoreError(f"row {row} of {self._path} is not done (its image is pending or failed)")
        offset, length = shard.index[row % layout.shard_size]
        if offset == EMPTY or length != layout.payload_bytes + CHECKSUM_BYTES:
            raise self._damage(shard, row, "its index does not list the row")
        behind = bytearray(CHECKSUM_BYTES)
        payload = out.reshape(-1).view(np.uint8)
        with explained(shard.path):
            count = read_fully(shard.descriptor, [payload.data, memoryview(behind)], int(offset))
        if count != length:
            raise self._damage(shard, row, "the file is too short")
        computed = crc32c(payload)
        if computed != int.from_bytes(behind, "little"):
            raise self._damage(shard, row, "the checksum behind the row is not that of its bytes")
        if computed != shard.checksums[row]:
            raise self._damage(
                shard, row, "the bytes are whole, but not those that were committed for this row"
            )

    def _damage(self, shard: _OpenShard, row: int, fact: str) -> StoreDamaged:
        key = self._manifest.records(rows=range(row, row + 1))[0].key
        return StoreDamaged(f"{shard.path}, row {row} ({key!r}): {fact}; {TAKE_OUT}")


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
