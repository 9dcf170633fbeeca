"""`mobilesam precompute --dry-run`: what a run would do, need and take, without doing it."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..sam import CheckpointError, ImageError, load_image, normalize_and_pad, place_on_canvas, read_image
from ..store import array_layouts
from .config import PrecomputeConfig
from .opening import TeacherFile, find_teacher
from .plan import Plan
from .progress import Observer, Silent
from .run import planned


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
    for file in plan.listing.files:
        try:
            data = read_image(plan.listing.root, file.key, offset=file.offset, size=file.size)
            return round(_timed(plan, teacher, data), 4)
        except ImageError:
            continue  # a run would record it as failed; the next one will do for timing
    return None


def _timed(plan: Plan, file: TeacherFile, data: bytes) -> float:
    """Seconds from an image's bytes to its embedding, the second time: the first also warms up."""
    import numpy as np
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
    seconds = 0.0
    for _ in range(2 if teacher.device.type == "cuda" else 1):
        start = time.perf_counter()
        decoded = load_image(data, plan.image_size)
        canvas_BHWC = np.zeros((1, plan.image_size, plan.image_size, 3), dtype=np.uint8)
        place_on_canvas(decoded, canvas_BHWC[0])
        sizes_B2 = torch.tensor([decoded.resized_size])
        teacher.embed(normalize_and_pad(torch.from_numpy(canvas_BHWC), sizes_B2)).cpu()
        seconds = time.perf_counter() - start
    return seconds


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
