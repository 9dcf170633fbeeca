"""Seconds an image of a teacher alone, ours and segment_anything's, without precompute around it.

Each function is called in a process of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mobilesam.precompute.sizing import BATCH_ON_CPU, BATCH_ON_CUDA
from mobilesam.sam import image_pixels, load_image
from mobilesam.sam.allocator import keep_freed_memory
from mobilesam.sam.teacher import load_teacher


def embedding_seconds(
    teacher: str, checkpoint: Path | None, image_size: int, photos: Sequence[Path]
) -> list[float]:
    """Return the seconds of `Teacher.embed` for each photo, under the conditions of precompute's workers.

    Device, precision, threads, allocator and batch size are precompute's defaults. A batch repeats one photo, and its
    time is divided by the batch size.
    """
    _like_a_worker()
    loaded = load_teacher(teacher, checkpoint, image_size=image_size, device="auto", precision="auto")
    batch = BATCH_ON_CPU if loaded.device.type == "cpu" else BATCH_ON_CUDA
    seconds = []
    for number, photo in enumerate([photos[0], *photos]):
        pixels = image_pixels(load_image(photo.read_bytes(), image_size), image_size, loaded.device)
        pixels = pixels.repeat(batch, 1, 1, 1)
        began = time.perf_counter()
        loaded.embed(pixels).cpu()
        if number:  # the first call also loads the weights into memory
            seconds.append((time.perf_counter() - began) / batch)
    return seconds


def loop_seconds(teacher: str, checkpoint: Path, photos: Sequence[Path]) -> list[float]:
    """Return the seconds of segment_anything's loop for each photo: open, decode, `SamPredictor.set_image`, float32.

    The allocator is that of precompute's workers here, too, which makes the loop faster.
    """
    from segment_anything import SamPredictor, sam_model_registry

    _like_a_worker()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sam = sam_model_registry[teacher]()
    sam.load_state_dict(torch.load(checkpoint, weights_only=True, mmap=True))
    predictor = SamPredictor(sam.to(device).eval())
    seconds = []
    for number, photo in enumerate([photos[0], *photos]):
        began = time.perf_counter()
        with Image.open(photo) as image:
            predictor.set_image(np.asarray(image.convert("RGB")))
        predictor.get_image_embedding().cpu()
        if number:
            seconds.append(time.perf_counter() - began)
    return seconds


def _like_a_worker() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_memory()
