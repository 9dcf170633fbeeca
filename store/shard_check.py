"""A shard's files against its listing, row by row: what is damaged, and how."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .file_check import FileCheck, Finding, is_zero
from .kept_check import TarCheck
from .kept_images import tar_path
from .layout import CHECKSUM_BYTES, EMPTY, ArrayLayout, crc32c
from .listing import ShardListing
from .records import ImageRecord
from .shard_file import read_chunk, read_fully
from .spec import StoreSpec


def check_shard(store: Path, spec: StoreSpec, listing: ShardListing) -> list[Finding]:
    """Everything that is wrong with a committed shard. StoreError when files can't be read for a reason that says
    nothing of the shard, as for want of permission."""
    found = [Finding(problem=problem) for problem in listing.problems]
    if any(problem.row is None for problem in listing.problems):
        return found  # how many rows there should be is not known
    for layout in spec.layouts:
        path = store / layout.name / layout.file_name(listing.shard)
        found += ArrayCheck(path, layout, listing).findings()
    if spec.kept_images is not None:
        found += TarCheck(tar_path(store, listing.shard), spec.kept_images, listing).findings()
    return found


class ArrayCheck(FileCheck):
    """A shard's file of one array."""

    def __init__(self, path: Path, layout: ArrayLayout, listing: ShardListing) -> None:
        super().__init__(path, listing)
        self._layout = layout

    def _examine(self, descriptor: int) -> Iterator[Finding]:
        layout, listing = self._layout, self._listing
        size, expected = os.fstat(descriptor).st_size, layout.file_bytes(len(listing.rows))
        if size != expected:
            yield self._short(size, expected)
            return
        tail = bytearray(layout.index_bytes)
        read_fully(descriptor, [memoryview(tail)], size - layout.index_bytes)
        try:
            index = layout.decode_index(bytes(tail))
        except ValueError:
            if is_zero(descriptor, size):
                yield self._of_file("zeros", f"the file is nothing but zero bytes: {self._images()} are lost")
            else:
                yield self._of_file("checksum", f"the file's index is damaged: {self._images()} are lost")
            return
        yield from self._compare(descriptor, index)

    def _compare(self, descriptor: int, index: np.ndarray) -> Iterator[Finding]:
        """Every slot of the index against the listing, and every listed row's bytes."""
        first = self._listing.rows.start
        done = {record.row - first: record for record in self._listing.records if record.status == "done"}
        damaged = {problem.row - first for problem in self._listing.problems if problem.row is not None}
        payload = np.empty(self._layout.payload_bytes, np.uint8)
        for slot, (offset, length) in enumerate(index.tolist()):
            if slot in damaged:
                continue
            record = done.get(slot)
            if record is None:
                if offset != EMPTY or length != EMPTY:
                    message = "the file holds a row here, though the manifest lists none that is done"
                    yield self._of_row("listing", message, first + slot)
            elif (offset, length) != (
                slot * self._layout.stride,
                self._layout.payload_bytes + CHECKSUM_BYTES,
            ):
                message = "the manifest lists the row, but the file's index does not have it in its place"
                yield self._of_row("listing", message, record.row, record.key)
            else:
                yield from self._compare_row(descriptor, offset, record, payload)

    def _compare_row(
        self, descriptor: int, offset: int, record: ImageRecord, payload: np.ndarray
    ) -> Iterator[Finding]:
        stored = read_chunk(descriptor, offset, payload)
        computed = crc32c(payload)
        listed = record.scales_crc32c if self._layout.name == "scales" else record.crc32c
        if computed == listed == stored:
            if not _is_finite(payload.view(self._layout.dtype)):
                yield self._of_row("not-finite", "it holds NaN or infinite values", record.row, record.key)
        elif computed == listed:
            message = "the bytes are whole, but the checksum behind them is damaged"
            yield self._of_row("checksum", message, record.row, record.key)
        elif computed == stored:
            message = "the bytes are whole, but not those that were committed for this row"
            yield self._of_row(
                "identity", message, record.row, record.key, foreign=(self._layout.name, computed)
            )
        elif not payload.any():
            yield self._of_row("zeros", "there are zero bytes in its place", record.row, record.key)
        else:
            message = "the bytes are not those that were written: their checksum is another"
            yield self._of_row("checksum", message, record.row, record.key)


def _is_finite(values: np.ndarray) -> bool:
    if values.dtype.kind != "f":
        return True
    if values.dtype.itemsize == 2:
        # isfinite converts float16 value by value; its exponent says the same five times as fast.
        exponent = np.uint16(0x7C00)
        return bool(((values.view(np.uint16) & exponent) != exponent).all())
    return bool(np.isfinite(values).all())
