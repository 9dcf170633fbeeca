"""What the manifest says of images and shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["pending", "done", "failed"]


@dataclass(frozen=True, kw_only=True)
class NewImage:
    """An image to be given a row. `key` is relative to the image root, '/'-separated, with surrogateescape for
    bytes that are not UTF-8; a tar acts as a folder. `offset` is where a tar member's data begins, in bytes;
    `size` the file's length in bytes as listed."""

    key: str
    size: int
    offset: int | None = None


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """What a worker learned of one image, committed with its shard.

    A failed image has a `reason` and no checksum; its hash and sizes are there as far as they could be learned.
    Sizes are (height, width) in pixels; `bytes` is the file's length.
    """

    row: int
    reason: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    original_size: tuple[int, int] | None = None
    resized_size: tuple[int, int] | None = None
    crc32c: int | None = None
    scales_crc32c: int | None = None


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One row of the manifest. Status follows from commits: pending until the row's shard is committed."""

    row: int
    key: str
    status: Status
    reason: str | None
    sha256: str | None
    bytes: int | None
    original_size: tuple[int, int] | None
    resized_size: tuple[int, int] | None
    crc32c: int | None
    scales_crc32c: int | None
    offset: int | None
    size: int


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Rows by status."""

    done: int
    failed: int
    pending: int

    @property
    def rows(self) -> int:
        """All rows."""
        return self.done + self.failed + self.pending


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How a set of images was chosen: the fraction and seed of the subset rule, and the limit if any."""

    fraction: float
    seed: int
    limit: int | None
