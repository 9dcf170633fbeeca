"""One committed shard against the manifest: its rows' checksums, its arrays' files row by row, its kept images."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.durable import explain_os_errors
from ..common.errors import StoreDamaged, counted
from .checksum import CHECKSUM_BYTES, crc32c, shard_digest
from .database import SELECT_RECORDS, decode_record
from .kept_images import BLOCK, END, header, padding, tar_bytes, tar_path
from .layout import EMPTY, ArrayLayout
from .manifest import Manifest
from .reader import read_chunk, read_fully
from .records import ImageRecord, KeptImage, Problem, ProblemKind
from .spec import StoreSpec

FAILING_DISK = {errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENXIO, errno.ENODATA}
"""Error numbers that mean damage to this one file's blocks; others, such as permissions, don't."""


@dataclass(frozen=True, kw_only=True)
class ShardListing:
    """Manifest's entries about one committed shard."""

    shard: int
    attempt: str
    rows: range
    """Rows that the shard was committed with; empty if the shard's own fields can't be read."""
    records: tuple[ImageRecord, ...]
    """Records of the rows whose checksums are right."""
    problems: tuple[Problem, ...]
    """Damage to the other rows, and to the shard's own fields."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Problem found by the check of a shard."""

    problem: Problem
    foreign: tuple[str, int] | None = None
    """Name of the array and crc32c of the bytes, if a row holds intact bytes that are not its own."""


def shard_listing(manifest: Manifest, shard: int, shard_size: int) -> ShardListing | None:
    """Read a shard's entries in the manifest, and verify their checksums.

    Args:
        manifest: manifest of the store.
        shard: number of the shard.
        shard_size: rows of a full shard.

    Returns:
        The listing, with damage to the manifest among its `problems`; None if the shard is not committed, or no
        longer.

    Raises:
        StoreError: the manifest can't be read for a reason other than damage.
    """
    first = shard * shard_size
    try:
        with manifest.snapshot():
            shards = manifest.query("SELECT * FROM shards WHERE shard = ?", (shard,))
            found = manifest.query(
                f"{SELECT_RECORDS} WHERE row >= ? AND row < ? ORDER BY row", (first, first + shard_size)
            )
    except StoreDamaged as error:
        problem = Problem(kind="listing", message=str(error), shard=shard)
        return ShardListing(shard=shard, attempt="", rows=range(0), records=(), problems=(problem,))
    if not shards:
        return None
    *fields, digest = shards[0]
    rows = range(first, first + (fields[1] if isinstance(fields[1], int) else 0))
    records, problems = [], []
    for row in found:
        try:
            record = decode_record(row)
        except StoreDamaged as error:
            problems.append(Problem(kind="listing", message=str(error), shard=shard, row=row[0]))
        else:
            if record.status != "pending":
                records.append(record)
    listed = [row[-1] for row in found if row[-2]]
    if not problems and (shard_digest(tuple(fields), listed) != digest or len(records) != len(rows)):
        problems.append(
            Problem(
                kind="listing",
                message=f"the manifest lists {counted(len(records), 'row')} of this shard, which was committed with "
                f"{len(rows)}, or its checksum of them is wrong",
                shard=shard,
            )
        )
    return ShardListing(
        shard=shard, attempt=fields[4], rows=rows, records=tuple(records), problems=tuple(problems)
    )


def check_shard(store: Path, spec: StoreSpec, listing: ShardListing) -> list[Finding]:
    """Check the files of a committed shard against its listing.

    Args:
        store: path of the store.
        spec: description of the store.
        listing: the shard's entries in the manifest, as `shard_listing` reads them.

    Returns:
        All problems found, those of the listing first.

    Raises:
        StoreError: files can't be read for a reason other than damage, such as permissions.
    """
    found = [Finding(problem=problem) for problem in listing.problems]
    if any(problem.row is None for problem in listing.problems):
        return found  # the number of rows that there should be is not known
    for layout in spec.layouts:
        path = store / layout.name / layout.file_name(listing.shard)
        found += ArrayCheck(path, layout, listing).findings()
    if spec.kept_images is not None:
        found += TarCheck(tar_path(store, listing.shard), spec.kept_images, listing).findings()
    return found


class FileCheck(ABC):
    """Check of one file of a shard: `findings` opens the file, `_examine` reads it."""

    def __init__(self, path: Path, listing: ShardListing) -> None:
        self._path = path
        self._listing = listing

    def findings(self) -> list[Finding]:
        """Return all problems of the file.

        Raises:
            StoreError: it can't be read for a reason other than damage, such as permissions.
        """
        with explain_os_errors(self._path):
            try:
                descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                return [self._of_file("missing", f"the file is missing: {self._images()} are lost")]
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

    @abstractmethod
    def _examine(self, descriptor: int) -> Iterator[Finding]:
        """Yield the problems of the open file. May raise OSError."""

    def _short(self, size: int, expected: int) -> Finding:
        message = f"the file has {size:,} bytes instead of {expected:,}: {self._images()} are lost"
        return self._of_file("short", message)

    def _zeros(self) -> Finding:
        return self._of_file("zeros", f"the file holds only zero bytes: {self._images()} are lost")

    def _images(self) -> str:
        count = sum(record.status == "done" for record in self._listing.records)
        return counted(count, "image")

    def _unreadable(self, error: OSError) -> Finding:
        return self._of_file("unreadable", f"the disk can't read it ({error.strerror}): check the disk")

    def _of_file(self, kind: ProblemKind, message: str) -> Finding:
        return Finding(
            problem=Problem(kind=kind, message=message, file=str(self._path), shard=self._listing.shard)
        )

    def _of_row(
        self,
        kind: ProblemKind,
        message: str,
        row: int,
        key: str | None = None,
        foreign: tuple[str, int] | None = None,
    ) -> Finding:
        return Finding(
            problem=Problem(
                kind=kind, message=message, file=str(self._path), shard=self._listing.shard, row=row, key=key
            ),
            foreign=foreign,
        )


class ArrayCheck(FileCheck):
    """Check of a shard's file of one array: length, index, every row's bytes and checksums."""

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
            if _is_zero(descriptor, size):
                yield self._zeros()
            else:
                yield self._of_file("checksum", f"the file's index is damaged: {self._images()} are lost")
            return
        yield from self._compare(descriptor, index)

    def _compare(self, descriptor: int, index: np.ndarray) -> Iterator[Finding]:
        """Compare every slot of the index with the listing, and every listed row's bytes with its checksums."""
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
                    message = "the file holds a row here, though the manifest does not list it as done"
                    yield self._of_row("listing", message, first + slot)
            elif (offset, length) != (
                slot * self._layout.stride,
                self._layout.payload_bytes + CHECKSUM_BYTES,
            ):
                message = (
                    "the manifest lists the row as done, but the file's index does not list it at its offset"
                )
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
            message = "the bytes are intact, but the checksum stored behind them is damaged"
            yield self._of_row("checksum", message, record.row, record.key)
        elif computed == stored:
            message = "the bytes are intact, but not those that were committed for this row"
            yield self._of_row(
                "identity", message, record.row, record.key, foreign=(self._layout.name, computed)
            )
        elif not payload.any():
            yield self._of_row("zeros", "its bytes are all zero", record.row, record.key)
        else:
            message = "the bytes are not those that were written: their checksum differs"
            yield self._of_row("checksum", message, record.row, record.key)


class TarCheck(FileCheck):
    """Check of a shard's kept images: the tar's length, every member's header and bytes."""

    def __init__(self, path: Path, kind: str, listing: ShardListing) -> None:
        super().__init__(path, listing)
        self._kind = kind

    def _examine(self, descriptor: int) -> Iterator[Finding]:
        kept = [
            (record, record.kept)
            for record in self._listing.records
            if record.status == "done" and record.kept is not None
        ]
        size, expected = os.fstat(descriptor).st_size, tar_bytes(image for _, image in kept)
        # If a row's listing is damaged, the length of its image isn't known; but every tar has its end blocks.
        if size < len(END) or (size != expected and not self._listing.problems):
            yield self._short(size, expected)
        elif kept and _is_zero(descriptor, size):
            yield self._zeros()
        else:
            for record, image in kept:
                yield from self._compare(descriptor, record, image)
            if os.pread(descriptor, len(END), size - len(END)) != END:
                yield self._of_file("checksum", "the tar's end is damaged, though its images may be intact")

    def _compare(self, descriptor: int, record: ImageRecord, image: KeptImage) -> Iterator[Finding]:
        block = header(record.row, self._kind, image.bytes)
        filled = image.bytes + padding(image.bytes)
        found = os.pread(descriptor, BLOCK + filled, image.offset - BLOCK)
        if crc32c(found[BLOCK : BLOCK + image.bytes]) != image.crc32c:
            message = "its kept image is not the one that was written: its checksum differs"
        elif found[:BLOCK] != block or any(found[BLOCK + image.bytes :]):
            message = "its kept image is intact, but its header or padding in the tar is damaged"
        else:
            return
        yield self._of_row("checksum", message, record.row, record.key)


def _is_zero(descriptor: int, size: int) -> bool:
    """Return True if an open file of `size` bytes holds only zero bytes."""
    piece = 1 << 20
    return not any(os.pread(descriptor, piece, start).strip(b"\0") for start in range(0, size, piece))


def _is_finite(values: np.ndarray) -> bool:
    if values.dtype.kind != "f":
        return True
    if values.dtype.itemsize == 2:
        # isfinite converts float16 value by value; testing the exponent is five times as fast.
        exponent = np.uint16(0x7C00)
        return bool(((values.view(np.uint16) & exponent) != exponent).all())
    return bool(np.isfinite(values).all())
