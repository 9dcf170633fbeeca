"""What the manifest says of images and shards."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..common.image_ref import ImageRef

Status = Literal["pending", "done", "failed"]
ProblemKind = Literal[
    "missing",
    "short",
    "zeros",
    "checksum",
    "identity",
    "not-finite",
    "unreadable",
    "listing",
    "orphan",
    "metadata",
    "head",
    "audit",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptImage:
    """Where in its shard's tar an image file lies, in bytes, and the crc32c of it."""

    offset: int
    bytes: int
    crc32c: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RowResult:
    """What a worker learned of one image, committed with its shard.

    A failed image has a `reason` and no checksum; its hash and sizes are there as far as they could be learned.
    Sizes are (height, width) in pixels; `bytes` is the file's length; `kept` is there in stores that keep images.
    """

    row: int
    reason: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    original_size: tuple[int, int] | None = None
    resized_size: tuple[int, int] | None = None
    crc32c: int | None = None
    scales_crc32c: int | None = None
    kept: KeptImage | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
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
    kept: KeptImage | None
    offset: int | None
    size: int

    @property
    def ref(self) -> ImageRef:
        """The image as it was listed."""
        return ImageRef(key=self.key, size=self.size, offset=self.offset)


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
    """How a set of images was chosen: the fraction and seed of the subset rule, and the limit if any.

    `sources` are the absolute paths of the folders and tars that were named, `checkpoint` that of the teacher's
    file when one was named: kept so that the command that goes on with a store can be told.
    """

    fraction: float
    seed: int
    limit: int | None
    sources: tuple[str, ...] = ()
    checkpoint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Audit:
    """One stored row against a fresh float32 run of the teacher: `cosine` over the 256 channels of a cell, mean
    over cells; `relative_mse` against the fresh embedding's own mean per channel."""

    row: int
    cosine: float
    relative_mse: float


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is not as committed.

    Kinds: "missing" (a shard's file), "short" (a file of another length), "zeros" (where bytes should be),
    "checksum", "identity" (whole bytes, but not those listed), "not-finite" (NaN or infinity), "unreadable" (the
    disk fails), "listing" (the manifest contradicts itself or the files), "orphan" (a file that nothing lists),
    "metadata" (a zarr.json), "head", "audit" (a row out of tolerance).
    """

    kind: ProblemKind
    message: str
    file: str | None = None
    shard: int | None = None
    row: int | None = None
    key: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
