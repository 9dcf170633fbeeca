"""What a precompute job is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..common.errors import PrecomputeError as PrecomputeError
from ..common.errors import PrecomputeInterrupted as PrecomputeInterrupted
from ..store import DTYPES, PRECISIONS

DEFAULT_TEACHER = "vit_h"
DEFAULT_IMAGE_SIZE = 1024
DEFAULT_DTYPE = "float16"
DEFAULT_IMAGE_TIMEOUT = 120.0
"""Seconds: a hundred times what the slowest photo of a camera takes, and short of a night's work lost to one file."""
LARGEST_SHARD_SIZE = 10_000
"""Images; at SAM's 2 MB each that is a file of 20 GB, and all of it is lost with a killed worker."""


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Options of one run. None (for `precision`: "auto") means the store's own setting where there is a store,
    else the default: vit_h, 1024 pixels, float16, a shard size and precision chosen for the hardware.

    `fraction` in (0, 1] and `seed` choose images by the hash of their key; `limit` then caps their number.
    `workers` are processes of a local cluster, ignored when `scheduler` (a dask address) is given. `compile`: workers
    have torch.compile translate the teacher for batches; the audit's is left as it is. An image that
    takes longer than `image_timeout` seconds to read and decode fails. At the end `audit` random images of the run
    are embedded again in float32 and compared with what is stored. `keep_images` has a new store keep the resized
    images too, losslessly, so that training needs no other; a store that is there goes on as it was made.
    """

    images: tuple[Path, ...]
    out: Path
    teacher: str | None = None
    checkpoint: Path | None = None
    fraction: float = 1.0
    seed: int = 0
    limit: int | None = None
    extend: bool = False
    retry_failed: bool = False
    dtype: str | None = None
    precision: str = "auto"
    device: str = "auto"
    workers: int | None = None
    scheduler: str | None = None
    shard_size: int | None = None
    batch_size: int | None = None
    compile: bool = False
    image_size: int | None = None
    image_timeout: float = DEFAULT_IMAGE_TIMEOUT
    audit: int = 2
    keep_images: bool = False
    performance_report: Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.images, str | Path):
            raise TypeError(f"images is a tuple of paths, not {self.images!r} alone")
        _check(bool(self.images), "no images: name a folder or a .tar file with --images")
        _check(0 < self.fraction <= 1, f"--fraction {self.fraction} is not in (0, 1]")
        for name in ("limit", "workers", "shard_size", "batch_size"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"--{name.replace('_', '-')} {value} is less than 1")
        _check(self.audit >= 0, f"--audit {self.audit} is less than 0")
        _check(
            0 < self.image_timeout < float("inf"),
            f"--image-timeout {self.image_timeout:g} is no number of seconds above 0",
        )
        _check(
            self.shard_size is None or self.shard_size <= LARGEST_SHARD_SIZE,
            f"--shard-size {self.shard_size} is more than {LARGEST_SHARD_SIZE}",
        )
        _check(
            self.dtype is None or self.dtype in DTYPES,
            f"--dtype {self.dtype} is none of {', '.join(DTYPES)}",
        )
        _check(
            self.precision in ("auto", *PRECISIONS),
            f"--precision {self.precision} is none of auto, {', '.join(PRECISIONS)}",
        )
        size = self.image_size
        _check(
            size is None or (size >= 64 and size % 16 == 0),
            f"--image-size {size} is not a multiple of 16 from 64 upwards",
        )


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise PrecomputeError(message)
