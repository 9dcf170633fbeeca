"""One file of a committed shard against its listing: what every such check does."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .durable import explained
from .listing import ShardListing
from .records import Problem, ProblemKind

FAILING_DISK = {errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENXIO, errno.ENODATA}
"""Errors that tell of this one file's blocks, rather than of permissions or of too many open files."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A problem; of a row with whole bytes that aren't its own, also their checksum and array."""

    problem: Problem
    foreign: tuple[str, int] | None = field(default=None)


class FileCheck(ABC):
    """`findings` opens the file and has `_examine` look at it."""

    def __init__(self, path: Path, listing: ShardListing) -> None:
        self._path = path
        self._listing = listing

    def findings(self) -> list[Finding]:
        """Everything that is wrong with the file. StoreError when it can't be read for a reason that says nothing of
        it, as for want of permission."""
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

    @abstractmethod
    def _examine(self, descriptor: int) -> Iterator[Finding]:
        """What is wrong with the open file. May raise OSError."""

    def _short(self, size: int, expected: int) -> Finding:
        message = f"the file has {size:,} bytes instead of {expected:,}: {self._images()} are lost"
        return self._of_file("short", message)

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


def is_zero(descriptor: int, size: int) -> bool:
    """Whether an open file of `size` bytes is nothing but zero bytes."""
    piece = 1 << 20
    return not any(os.pread(descriptor, piece, start).strip(b"\0") for start in range(0, size, piece))
