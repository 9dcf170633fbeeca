"""A shard's files against its listing, row by row: what is damaged, and how."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .durable import explained
from .layout import CHECKSUM_BYTES, EMPTY, ArrayLayout, crc32c
from .listing import ShardListing
from .reader import read_fully
from .records import ImageRecord, Problem, ProblemKind

FAILING_DISK = {errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENXIO, errno.ENODATA}
"""Errors that tell of this one file's blocks, rather than of permissions or of too many open files."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A problem; of a row with whole bytes that aren't its own, also their checksum and array."""

    problem: Problem
    foreign: tuple[str, int] | None = field(default=None)


def check_shard(store: Path, layouts: Sequence[ArrayLayout], listing: ShardListing) -> list[Finding]:
    """Everything that is wrong with a committed shard. StoreError when files can't be read for a reason that says
    nothing of the shard, as for want of permission."""
    found = [Finding(problem=problem) for problem in listing.problems]
    if any(problem.row is None for problem in listing.problems):
        return found  # how many rows there should be is not known
    for layout in layouts:
        found += _FileCheck(store / layout.name / layout.file_name(listing.shard), layout, listing).findings()
    return found


class _FileCheck:
    """One file of the shard."""

    def __init__(self, path: Path, layout: ArrayLayout, listing: ShardListing) -> None:
        self._path = path
        self._layout = layout
        self._listing = listing

    def findings(self) -> list[Finding]:
        with explained(self._path):
            try:
                descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                return [self._of_file("missing", f"the file is missing, with {self._images()}")]
            except OSError as error:
                if error.errno not in FAILING_DISK:
                    raise
                return [self._unreadable(error)]
            found: list[Finding] = []
            try:
                found.extend(self._examine(descriptor))
            except OSError as error:
                if error.errno not in FAILING_DISK | {errno.EISDIR}:
                    raise
                found.append(self._unreadable(error))
            finally:
                os.close(descriptor)
            return found

    def _examine(self, descriptor: int) -> Iterator[Finding]:
        layout, listing = self._layout, self._listing
        size, expected = os.fstat(descriptor).st_size, layout.file_bytes(len(listing.rows))
        if size != expected:
            yield self._of_file(
                "short", f"the file has {size:,} bytes instead of {expected:,}: {self._images()} are lost"
            )
            return
        tail = bytearray(layout.index_bytes)
        read_fully(descriptor, [memoryview(tail)], size - layout.index_bytes)
        try:
            index = layout.decode_index(bytes(tail))
        except ValueError:
            if _is_zero(descriptor, size):
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
        behind = bytearray(CHECKSUM_BYTES)
        read_fully(descriptor, [payload.data, memoryview(behind)], offset)
        computed, stored = crc32c(payload), int.from_bytes(behind, "little")
        listed = record.scales_crc32c if self._layout.name == "scales" else record.crc32c
        if computed == listed == stored:
            if not _is_finite(payload.view(self._layout.dtype)):
                yield self._of_row("not-finite", "it holds NaN or infinite values", record.row, record.key)
        elif computed == listed:
            message = "the bytes are whole, but the checksum behind them is damaged"
            yield self._of_row("checksum", message, record.row, record.key)
        elif computed == stored:
            message = "the bytes are whole, but not those that were committed for this row"
            yield self._of_row("identity", message, record.row, record.key, foreign=computed)
        elif not payload.any():
            yield self._of_row("zeros", "there are zero bytes in its place", record.row, record.key)
        else:
            message = "the bytes are not those that were written: their checksum is another"
            yield self._of_row("checksum", message, record.row, record.key)

    def _images(self) -> str:
        count = sum(record.status == "done" for record in self._listing.records)
        return f"{count} image{'' if count == 1 else 's'}"

    def _unreadable(self, error: OSError) -> Finding:
        return self._of_file("unreadable", f"the disk can't read it ({error.strerror}): check the disk")

    def _of_file(self, kind: ProblemKind, message: str) -> Finding:
        return Finding(
            problem=Problem(kind=kind, message=message, file=str(self._path), shard=self._listing.shard)
        )

    def _of_row(
        self, kind: ProblemKind, message: str, row: int, key: str | None = None, foreign: int | None = None
    ) -> Finding:
        return Finding(
            problem=Problem(
                kind=kind, message=message, file=str(self._path), shard=self._listing.shard, row=row, key=key
            ),
            foreign=None if foreign is None else (self._layout.name, foreign),
        )


def _is_zero(descriptor: int, size: int) -> bool:
    piece = 1 << 20
    return not any(os.pread(descriptor, piece, start).strip(b"\0") for start in range(0, size, piece))


def _is_finite(values: np.ndarray) -> bool:
    if values.dtype.kind != "f":
        return True
    if values.dtype.itemsize == 2:
        # isfinite converts float16 value by value; its exponent says the same five times as fast.
        exponent = np.uint16(0x7C00)
        return bool(((values.view(np.uint16) & exponent) != exponent).all())
    return bool(np.isfinite(values).all())
