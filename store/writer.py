"""Writing one shard whole, beside its place: what a worker does. No lock, no manifest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from .durable import explained
from .layout import CHECKSUM_BYTES, ArrayLayout, crc32c
from .quantize import quantize


@dataclass(frozen=True, kw_only=True)
class StoredRow:
    """Checksums of a row as written: of the embedding's payload, and of its scales where there are any."""

    crc32c: int
    scales_crc32c: int | None


class ShardWriter:
    """Streams rows into `SHARD.ATTEMPT.partial`, one file per array of the store.

    Use as a context manager: leaving it by an exception, or without `finish`, removes the partial files.
    """

    def __init__(
        self, store: Path, layouts: Sequence[ArrayLayout], shard: int, attempt: str, slots: int
    ) -> None:
        self._layouts = layouts
        self._slots = slots
        self._paths = [partial_path(store, layout, shard, attempt) for layout in layouts]
        self._present: list[int] = []
        self._finished = False
        self._descriptors: list[int] = []

    def __enter__(self) -> ShardWriter:
        try:
            for path in self._paths:
                with explained(path):
                    self._descriptors.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except BaseException:
            self._abandon()
            raise
        return self

    def add(self, slot: int, emb_CHW: np.ndarray) -> StoredRow:
        """Write one embedding, float32 (256, grid, grid), in the store's dtype.

        Raises ValueError when a value is NaN or infinite, before or after the conversion.
        """
        if emb_CHW.shape != self._layouts[0].item_shape:
            raise ValueError(f"the embedding has shape {emb_CHW.shape}, not {self._layouts[0].item_shape}")
        items = _encode(emb_CHW, self._layouts[0].dtype)
        with explained(self._paths[0]):
            checksums = [
                _write_chunk(descriptor, slot * layout.stride, item)
                for descriptor, layout, item in zip(self._descriptors, self._layouts, items, strict=True)
            ]
        self._present.append(slot)
        return StoredRow(crc32c=checksums[0], scales_crc32c=checksums[1] if len(checksums) > 1 else None)

    def finish(self) -> None:
        """Write the indexes and make the files durable; the coordinator may then put them in their place."""
        for descriptor, layout in zip(self._descriptors, self._layouts, strict=True):
            with explained(self._paths[0]):
                _write_all(descriptor, [layout.encode_index(self._present)], self._slots * layout.stride)
                os.fsync(descriptor)
        self._finished = True

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._finished:
            self._close()
        else:
            self._abandon()

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _abandon(self) -> None:
        self._close()
        for path in self._paths:
            path.unlink(missing_ok=True)


def partial_path(store: Path, layout: ArrayLayout, shard: int, attempt: str) -> Path:
    """Where one attempt at a shard is written before it is committed."""
    return store / layout.name / f"{layout.file_name(shard)}.{attempt}.partial"


def _encode(emb_CHW: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """The row's item in every array of the store."""
    if not np.isfinite(emb_CHW).all():
        raise ValueError("the teacher gave NaN or infinite values")
    if dtype == np.int8:
        return quantize(emb_CHW)
    with np.errstate(over="ignore"):
        values_CHW = np.ascontiguousarray(emb_CHW, dtype=dtype)
    if not np.isfinite(values_CHW).all():
        raise ValueError(
            f"the teacher's values reach {np.abs(emb_CHW).max():.4g}, past {dtype.name}'s range: "
            "store them as float32"
        )
    return (values_CHW,)


def _write_chunk(descriptor: int, offset: int, item: np.ndarray) -> int:
    checksum = crc32c(item)
    buffers: list[memoryview | bytes] = [
        item.reshape(-1).view(np.uint8).data,
        checksum.to_bytes(CHECKSUM_BYTES, "little"),
    ]
    _write_all(descriptor, buffers, offset)
    return checksum


def _write_all(descriptor: int, buffers: Sequence[memoryview | bytes], offset: int) -> None:
    """pwritev until everything is written: one call may write less."""
    pending = [memoryview(buffer) for buffer in buffers]
    while pending:
        written = os.pwritev(descriptor, pending, offset)
        offset += written
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if pending:
            pending[0] = pending[0][written:]
