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
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .buffers import aligned_empty
from .durable import explained
from .errors import TAKE_OUT, StoreDamaged, StoreError
from .layout import CHECKSUM_BYTES, EMPTY, ArrayLayout, crc32c, rows_of, shard_of
from .manifest import Manifest
from .quantize import dequantize
from .shard_file import ShardFile
from .spec import StoreSpec

OPEN_SHARDS = 128
"""Shard files held open at most; the usual limit of a process is 1024 descriptors."""

READS_IN_FLIGHT = 4
"""Rows of a batch that are read at a time: a disk serves several requests faster than one after another."""

CACHED_SHARE = 0.5
"""Of the machine's memory: a store larger than that is read past the system's cache, which would not hold it till the
next epoch, and copying into it costs half of the reading."""


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


class DirectReader:
    """Rows of one store by number. Safe to use from several threads; opens nothing before the first read."""

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
        """Read rows in the order given, into `out` where that is given.

        Raises:
            StoreDamaged: names the file, row and key of whatever is not as committed.
            StoreError: a row isn't done, or can't be read.
            ValueError: `out` is not for these rows of this store.
        """
        batch = self.empty(len(rows)) if out is None else out
        arrays = self._arrays(batch, len(rows))
        places = [(int(row), [array[place] for array in arrays]) for place, row in enumerate(rows)]
        if len(places) == 1:
            self._read_row(*places[0])
        elif places:
            futures = [self._threads().submit(self._read_row, row, items) for row, items in places]
            wait(futures)  # all of them: nobody writes into the batch once this is left
            for future in futures:
                future.result()
        return batch

    def empty(self, rows: int) -> StoredBatch:
        """An uninitialised batch for so many rows that starts at a page, as reads past the cache like it best."""
        arrays = [aligned_empty((rows, *layout.item_shape), layout.dtype) for layout in self._layouts]
        return StoredBatch(arrays[0], arrays[1] if len(arrays) > 1 else None)

    def close(self) -> None:
        """Let go of files and threads."""
        with self._mutex:
            self._shards.clear()
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None

    def _arrays(self, batch: StoredBatch, rows: int) -> list[np.ndarray]:
        """The arrays of a batch, one for each of the store's; ValueError when they are not for so many rows."""
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
        """As asked for, else when the system's cache could not keep what is read until it is read again."""
        if self._direct is None:
            rows = self._manifest.row_count()
            size = sum(layout.stride for layout in self._layouts) * rows
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            self._direct = size > CACHED_SHARE * memory
        return self._direct

    def forget(self, shard: int) -> None:
        """Let go of a shard whose file or listing has changed."""
        with self._mutex:
            self._shards.pop(shard, None)

    def _open(self, shard: int) -> tuple[ShardFile, ...]:
        with self._mutex:
            if shard in self._shards:
                self._shards.move_to_end(shard)
                return self._shards[shard]
            rows = rows_of(shard, self._spec.shard_size, (shard + 1) * self._spec.shard_size)
            listed = self._manifest.checksums(rows)
            opened = tuple(
                ShardFile(
                    self._path / layout.name / layout.file_name(shard),
                    layout,
                    {row: int(pair[place] or 0) for row, pair in listed.items()},
                    direct=self._reads_past_cache(),
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
        try:
            self._read_items(row, items)
        except StoreError:
            # A writer may have committed the shard anew since it was opened, or been at it just then.
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
            raise self._damage(shard, row, "its index does not list the row")
        payload = out.reshape(-1).view(np.uint8)
        with explained(shard.path):
            stored = shard.read(int(offset), payload)
        if stored is None:
            raise self._damage(shard, row, "the file is too short")
        computed = crc32c(payload)
        if computed != stored:
            raise self._damage(shard, row, "the checksum behind the row is not that of its bytes")
        if computed != shard.checksums[row]:
            raise self._damage(
                shard, row, "the bytes are whole, but not those that were committed for this row"
            )

    def _damage(self, shard: ShardFile, row: int, fact: str) -> StoreDamaged:
        key = self._manifest.records(rows=range(row, row + 1))[0].key
        return StoreDamaged(f"{shard.path}, row {row} ({key!r}): {fact}; {TAKE_OUT}")
