"""`mobilesam precompute --dry-run`: what a run would do, need and take, without doing it."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from ..sam import CheckpointError, normalize_and_pad
from ..store import array_layouts
from .config import PrecomputeConfig
from .decode import Batch, decoded_batches
from .messages import TaskImage
from .open_store import TeacherFile, find_teacher
from .plan import Plan
from .progress import Observer, Silent
from .run import planned


def dry_run(config: PrecomputeConfig, observer: Observer | None = None) -> dict[str, Any]:
    """Plan, and change nothing.

    Returns `images, pending, shards, shard_size, bytes_needed, bytes_free, seconds_per_image, seconds`: rows in
    all and to compute; shards in all; bytes on disk for what is to be computed (images that are kept taken to be
    as large as the first), and free there; the time of one image on this machine, timed, and of all pending ones
    by all workers, all without `compile`. The times are None when nothing is to be computed, or the checkpoint is
    not at hand: nothing is downloaded.
    """
    observer = observer or Silent()
    with ExitStack() as stack:
        plan, _ = planned(config, stack, observer)
    pending = sum(plan.pending.values())
    first = _first_decoded(plan) if pending else None
    seconds = None if first is None else _seconds_per_image(plan, first, observer)
    return {
        "images": plan.rows,
        "pending": pending,
        "shards": plan.shards,
        "shard_size": plan.shard_size,
        "bytes_needed": _bytes_needed(plan, first),
        "bytes_free": shutil.disk_usage(_existing(config.out.absolute())).free,
        "seconds_per_image": seconds,
        "seconds": None if seconds is None else seconds * pending / plan.hardware.workers,
    }


def _first_decoded(plan: Plan) -> Batch | None:
    """The first image that can be decoded, as a batch of its own; the others a run would record as failed."""
    images = [TaskImage(row=row, ref=file) for row, file in enumerate(plan.listing.files)]
    batches = decoded_batches(
        images, plan.listing.root, plan.image_size, 1, 1, plan.config.image_timeout, keep=plan.keeps_images
    )
    with closing(batches):
        return next((batch for batch in batches if batch.images[0].decoded is not None), None)


def _bytes_needed(plan: Plan, first: Batch | None) -> int:
    layouts = array_layouts(plan.dtype, plan.image_size, plan.shard_size)
    kept = 0 if first is None else len(first.images[0].kept or b"")
    return sum(
        kept * rows + sum(layout.file_bytes(rows) for layout in layouts) for rows in plan.pending.values()
    )


def _seconds_per_image(plan: Plan, first: Batch, observer: Observer) -> float | None:
    try:
        teacher = find_teacher(plan, observer, download=False)
    except CheckpointError as error:
        if plan.config.checkpoint is not None:
            raise
        observer.message(f"time not measured: {str(error).splitlines()[0]}")
        return None
    return round(_timed(plan, teacher, first), 4)


def _timed(plan: Plan, file: TeacherFile, batch: Batch) -> float:
    """Seconds from an image's bytes to its embedding; the teacher's are those of the second time on a GPU: the first
    also warms up."""
    import torch

    from ..sam.teacher import load_teacher

    teacher = load_teacher(
        file.name,
        file.path,
        image_size=plan.image_size,
        device=plan.hardware.devices[0] if not plan.config.scheduler else "cpu",
        precision=plan.hardware.precision,
        checkpoint_sha256=file.sha256,
    )
    decoding = batch.images[0].span
    seconds = 0.0
    for _ in range(2 if teacher.device.type == "cuda" else 1):
        start = time.perf_counter()
        pixels_BCHW = normalize_and_pad(torch.from_numpy(batch.canvas_BHWC), torch.from_numpy(batch.sizes_B2))
        teacher.embed(pixels_BCHW).cpu()
        seconds = time.perf_counter() - start
    return seconds + decoding.stop - decoding.start


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
