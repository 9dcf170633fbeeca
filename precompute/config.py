"""Options of a precompute job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..common.config import (
    AUTO_PRECISIONS,
    DTYPES,
    checkpoint_option,
    device_option,
    option,
    precision_option,
    require,
    require_image_size,
)

# For `mobilesam.precompute`, whose stub can only name modules of this room.
from ..common.errors import PrecomputeError as PrecomputeError
from ..common.errors import PrecomputeInterrupted as PrecomputeInterrupted
from ..sam.registry import teacher_option

DEFAULT_TEACHER = "vit_h"
DEFAULT_IMAGE_SIZE = 1024
DEFAULT_DTYPE = "float16"
DEFAULT_IMAGE_TIMEOUT = 120.0
"""Seconds: a hundred times the time of the slowest camera photo, and too short for one file to cost a night."""
LARGEST_SHARD_SIZE = 10_000
"""Images; at 2 MB per SAM embedding in float16 that is a file of 20 GB, all of which is lost with a killed worker."""


def _auto_or_number(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError("give auto or a number of images") from None


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Options of one precompute job, validated on construction.

    None (for `precision`: "auto") means the setting of the existing store, else the default. `fraction` is applied
    before `limit`. `workers` is ignored if `scheduler` is given. `compile` doesn't affect the audit's teacher, which
    is never compiled. `keep_images` doesn't change whether an existing store keeps images; they are kept losslessly.

    Raises:
        PrecomputeError: a value is outside its range.
    """

    images: tuple[Path, ...] = option(
        metavar="DIR|TAR|IMAGE...",
        help="Folders (searched recursively), .tar files, images, quoted patterns; several may follow one --images.",
    )
    out: Path = option(Path("store.zarr"), help="Store to write; an existing one is resumed.")
    teacher: str | None = teacher_option(
        "Teacher that embeds the images; NAME is of another package, help lists all [default: the store's, else "
        "vit_h]"
    )
    checkpoint: Path | None = checkpoint_option()
    fraction: float = option(
        1.0, metavar="F", help="Share of the images to embed, chosen by a hash of each image's name."
    )
    seed: int = option(0, help="Seed of the choice made for --fraction.")
    limit: int | None = option(None, metavar="N", help="Embed at most this many images.")
    extend: bool = option(
        False, help="Append images that the store lacks, also of folders beside the first one."
    )
    retry_failed: bool = option(False, help="Recompute shards with failed images.")
    dtype: str | None = option(
        None, choices=DTYPES, help="Type of the stored embeddings [default: the store's, else float16]"
    )
    precision: str = precision_option(
        "Precision of the teacher's arithmetic; auto is bfloat16 where the hardware accelerates it."
    )
    device: str = device_option()
    workers: int | None = option(
        None, metavar="N", help="Number of worker processes [default: one per GPU; 1 on a CPU]"
    )
    scheduler: str | None = option(None, metavar="ADDRESS", help="Use the dask cluster at this address.")
    shard_size: int | None = option(
        None,
        metavar="S",
        parse=_auto_or_number,
        text="auto",
        help="Images per shard; auto is 64, or fewer where a shard would take over five minutes.",
    )
    batch_size: int | None = option(
        None, metavar="B", help="Images per batch of the teacher [default: by device]"
    )
    compile: bool = option(
        False, help="Compile the teacher with torch.compile; takes minutes at the start of each worker."
    )
    image_size: int | None = option(
        None, metavar="PX", help="Side of the teacher's input in pixels [default: the store's, else 1024]"
    )
    image_timeout: float = option(
        DEFAULT_IMAGE_TIMEOUT,
        metavar="SECONDS",
        help="Time to read and decode one image; an image that takes longer fails.",
    )
    audit: int = option(
        2,
        metavar="K",
        help="Number of random images to embed again in float32 at the end and compare with the store.",
    )
    keep_images: bool = option(
        False,
        help="Keep the resized images in a new store, which then trains and verifies without the photos.",
    )
    performance_report: Path | None = option(
        None, metavar="FILE.html", help="Write dask's performance report to this file."
    )

    def __post_init__(self) -> None:
        if isinstance(self.images, str | Path):
            raise TypeError(f"images must be a tuple of paths; it is {self.images!r}")
        self._require(bool(self.images), "no images: name a folder or a .tar file with --images")
        self._require(0 < self.fraction <= 1, f"--fraction {self.fraction} is not in (0, 1]")
        for name in ("limit", "workers", "shard_size", "batch_size"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, f"--{name.replace('_', '-')} {value} is less than 1")
        self._require(self.audit >= 0, f"--audit {self.audit} is less than 0")
        timeout = self.image_timeout
        good = 0 < timeout < float("inf")
        self._require(good, f"--image-timeout {timeout:g} is not a number of seconds above 0")
        good = self.shard_size is None or self.shard_size <= LARGEST_SHARD_SIZE
        self._require(good, f"--shard-size {self.shard_size} is more than {LARGEST_SHARD_SIZE}")
        good = self.dtype is None or self.dtype in DTYPES
        self._require(good, f"--dtype {self.dtype} is none of {', '.join(DTYPES)}")
        good = self.precision in AUTO_PRECISIONS
        self._require(good, f"--precision {self.precision} is none of {', '.join(AUTO_PRECISIONS)}")
        require_image_size(self.image_size, PrecomputeError)

    def _require(self, good: bool, message: str) -> None:
        require(good, message, PrecomputeError)
