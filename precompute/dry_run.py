"""`mobilesam precompute --dry-run`: estimate the work, disk space and time of a run without doing it.

Shape suffixes: B images of a batch, H, W rows and columns of an image, C channels, 2 (height, width).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..common.errors import CheckpointError, counted
from ..sam import normalize_and_pad
from ..sam.photos.file_kinds import passed_over_line
from ..store import array_layouts
from .config import PrecomputeConfig
from .decode import Batch, decoded_batches
from .listing import SHOWN_PROBLEMS
from .messages import TaskImage
from .open_store import TeacherFile, find_teacher
from .plan import Plan, plan_run
from .progress import Observer, SilentObserver


def dry_run(config: PrecomputeConfig, observer: Observer | None = None) -> dict[str, Any]:
    """Plan a run and estimate its cost. Nothing is changed or downloaded.

    Args:
        config: options of the run.
        observer: receives messages.

    Returns:
        `images, pending`: rows in all, and to compute. `passed_over`: number of files that the listing passed over,
        by kind, and `skipped`: the first of those that could not be listed, with the reason. `shards, shard_size`:
        shards in all, and images per shard. `bytes_needed, bytes_free`: disk space for the pending rows (assuming
        that every kept image is as large as the first), and free space there. `seconds_per_image`: time of one image,
        measured on this machine without `compile`. `seconds`: time of all pending images on all workers. Both are
        None if nothing is pending, no image can be decoded, or the checkpoint is absent.

    Raises:
        PrecomputeError, SamError, StoreError: as in `precompute`.
    """
    observer = observer or SilentObserver()
    with ExitStack() as stack:
        plan, _ = plan_run(config, stack, observer)
    pending = sum(plan.pending.values())
    first = _first_decoded(plan) if pending else None
    seconds = None if first is None else _seconds_per_image(plan, first, observer)
    return {
        "images": plan.rows,
        "pending": pending,
        "passed_over": dict(plan.listing.passed_over),
        "skipped": [str(problem) for problem in plan.listing.problems[:SHOWN_PROBLEMS]],
        "shards": plan.shards,
        "shard_size": plan.shard_size,
        "bytes_needed": _bytes_needed(plan, first),
        "bytes_free": shutil.disk_usage(_existing(config.out.absolute())).free,
        "seconds_per_image": seconds,
        "seconds": None if seconds is None else seconds * pending / plan.hardware.workers,
    }


def plan_lines(estimate: Mapping[str, Any]) -> list[str]:
    """Format the result of `dry_run` as lines for people."""
    needed, free = estimate["bytes_needed"], estimate["bytes_free"]
    duration = "not measured" if estimate["pending"] else "none"
    if estimate["pending"] and estimate["seconds"] is not None:
        duration = (
            f"about {timedelta(seconds=round(estimate['seconds']))} "
            f"(one image took {estimate['seconds_per_image']:.3g} s here)"
        )
    lines = [
        f"images        {estimate['images']:,}, of which {estimate['pending']:,} to compute",
        f"shards        {estimate['shards']:,} of {counted(estimate['shard_size'], 'image')}",
        f"bytes needed  {needed:,} ({needed / 1e9:.2f} GB)",
        f"bytes free    {free:,} ({free / 1e9:.2f} GB)",
        f"time          {duration}",
    ]
    if estimate["passed_over"]:
        lines.append(passed_over_line(estimate["passed_over"]))
    if needed > free:
        lines.append(f"The disk has too little room: {needed - free:,} bytes are missing.")
    return lines


def _first_decoded(plan: Plan) -> Batch | None:
    """Return the first image that can be decoded, as a batch of one; None if there is none. A run would record the
    images before it as failed."""
    images = [TaskImage(row=row, ref=file) for row, file in enumerate(plan.listing.files)]
    batches = decoded_batches(
        images,
        plan.listing.root,
        plan.image_size,
        1,
        1,
        plan.config.image_timeout,
        keep_images=plan.keeps_images,
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
    """Measure the seconds of one image, decoding included. On a GPU the teacher's second pass is measured, since the
    first one includes the warm-up."""
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
    """Return the path itself or the nearest folder above it that exists."""
    while not path.exists():
        path = path.parent
    return path
