"""Records of the manifest and of the checks: results of images, audits, selections, problems."""

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
    """Place of an image file in its shard's tar (`offset` and length, in bytes), and its crc32c."""

    offset: int
    bytes: int
    crc32c: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RowResult:
    """Outcome of one image on a worker, committed with its shard.

    A failed image has a `reason` and no checksum; its hash and sizes are set if they were known before it failed.
    """

    row: int
    reason: str | None = None
    """Why the image failed; None if it is done."""
    sha256: str | None = None
    """SHA-256 of the image's file, in hex."""
    bytes: int | None = None
    """Length of the image's file."""
    original_size: tuple[int, int] | None = None
    """(height, width) in pixels, EXIF orientation applied."""
    resized_size: tuple[int, int] | None = None
    """(height, width) in pixels after resizing for the teacher, without padding."""
    crc32c: int | None = None
    """Checksum of the row's bytes in `embeddings`."""
    scales_crc32c: int | None = None
    """Checksum of the row's bytes in `scales`, in int8 stores."""
    kept: KeptImage | None = None
    """Resized image, in stores that keep images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """One row of the manifest: the image as listed, and its `RowResult` once the row's shard is committed.

    `status` follows from commits: pending until the shard is committed, then done or failed.
    """

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
        """Reference to the image as it was listed."""
        return ImageRef(key=self.key, size=self.size, offset=self.offset)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Number of rows by status."""

    done: int
    failed: int
    pending: int

    @property
    def rows(self) -> int:
        """Number of all rows."""
        return self.done + self.failed + self.pending


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Rule by which a set of images was chosen, and the options that a command needs to resume the work."""

    fraction: float
    """Share of the images that the subset rule keeps."""
    seed: int
    """Seed of the subset rule."""
    limit: int | None
    """Most images; None for no limit."""
    sources: tuple[str, ...] = ()
    """Absolute paths of the folders and tars that --images named."""
    checkpoint: str | None = None
    """Absolute path of the teacher's file, if --checkpoint named one."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Comparison of one stored row with a fresh float32 run of the teacher."""

    row: int
    cosine: float
    """Cosine over the 256 channels of a cell, mean over cells; -1 if undefined."""
    relative_mse: float
    """Squared error relative to the fresh embedding's variance about its mean per channel."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something in a store that is not as committed.

    Kinds: "missing" (a shard's file), "short" (a file of another length), "zeros" (only zero bytes), "checksum"
    (bytes that differ from their checksum), "identity" (intact bytes, but not those committed for the row),
    "not-finite" (NaN or infinity), "unreadable" (the disk fails), "listing" (the manifest contradicts itself or the
    files), "orphan" (a file of no committed shard), "metadata" (a zarr.json), "head" (SAM's prompt encoder and mask
    decoder), "audit" (a row out of tolerance).
    """

    kind: ProblemKind
    message: str
    file: str | None = None
    shard: int | None = None
    row: int | None = None
    key: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)
