"""A teacher by itself, without precompute around it. Each function is for a process of its own."""

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
    """Seconds of `Teacher.embed` for each of the photos, under a worker's conditions: device, precision, threads,
    allocator and batch are those of precompute's defaults. A batch repeats its photo, and its time is divided."""
    _like_a_worker()
    loaded = load_teacher(teacher, checkpoint, image_size=image_size, device="auto", precision="auto")
    batch = BATCH_ON_CPU if loaded.device.type == "cpu" else BATCH_ON_CUDA
    seconds = []
    for number, photo in enumerate([photos[0], *photos]):
        pixels = image_pixels(load_image(photo.read_bytes(), image_size), image_size, loaded.device)
        pixels = pixels.repeat(batch, 1, 1, 1)
        began = time.perf_counter()
        loaded.embed(pixels).cpu()
        if number:  # the first one's weights weren't in memory
            seconds.append((time.perf_counter() - began) / batch)
    return seconds


def loop_seconds(teacher: str, checkpoint: Path, photos: Sequence[Path]) -> list[float]:
    """Seconds of segment_anything's way for each of the photos: open, decode, `SamPredictor.set_image`, one by one,
    in float32. The allocator is a worker's, too, which helps it."""
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
