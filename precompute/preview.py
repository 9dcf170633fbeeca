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
from .decoding import Batch, decoded_batches
from .opening import TeacherFile, find_teacher
from .plan import Plan
from .progress import Observer, Silent
from .run import planned
from .tasks import TaskImage


def dry_run(config: PrecomputeConfig, observer: Observer | None = None) -> dict[str, Any]:
    """Plan, and change nothing.

    Returns `images, pending, shards, shard_size, bytes_needed, bytes_free, seconds_per_image, seconds`: rows in
    all and to compute; shards in all; bytes on disk for what is to be computed, and free there; the time of one
    image on this machine, timed, and of all pending ones by all workers. The times are None when nothing is to
    be computed, or the checkpoint is not at hand: nothing is downloaded.
    """
    observer = observer or Silent()
    with ExitStack() as stack:
        plan, _ = planned(config, stack, observer)
    pending = sum(plan.pending.values())
    layouts = array_layouts(plan.dtype, plan.image_size, plan.shard_size)
    seconds = _seconds_per_image(plan, observer) if pending else None
    return {
        "images": plan.rows,
        "pending": pending,
        "shards": plan.shards,
        "shard_size": plan.shard_size,
        "bytes_needed": sum(layout.file_bytes(rows) for layout in layouts for rows in plan.pending.values()),
        "bytes_free": shutil.disk_usage(_existing(config.out.absolute())).free,
        "seconds_per_image": seconds,
        "seconds": None if seconds is None else seconds * pending / plan.hardware.workers,
    }


def _seconds_per_image(plan: Plan, observer: Observer) -> float | None:
    try:
        teacher = find_teacher(plan, observer, download=False)
    except CheckpointError as error:
        if plan.config.checkpoint is not None:
            raise
        observer.message(f"time not measured: {str(error).splitlines()[0]}")
        return None
    images = [
        TaskImage(row=row, key=file.key, size=file.size, offset=file.offset)
        for row, file in enumerate(plan.listing.files)
    ]
    batches = decoded_batches(images, plan.listing.root, plan.image_size, 1, 1, plan.config.image_timeout)
    with closing(batches):
        for batch in batches:
            # One that can't be decoded a run would record as failed; the next one will do for timing.
            if batch.images[0].decoded is not None:
                return round(_timed(plan, teacher, batch), 4)
    return None


def _timed(plan: Plan, file: TeacherFile, batch: Batch) -> float:
    """Seconds from an image's bytes to its embedding; the teacher's are those of the second time on a GPU: the first
    also warms up."""
    import torch

    from ..sam.teachers import load_teacher

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
