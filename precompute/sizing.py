"""Sizes of shards and batches, and time limits, derived from the teacher's cost."""

from __future__ import annotations

import time

import torch

from ..sam.registry import TEACHERS

LARGEST_SHARD = 64
"""Most images of a shard whose size is chosen automatically."""
LARGEST_ON_FAST_GPUS = 256
"""The same where a GPU would be done with such a shard in less than SHORTEST_SECONDS."""
SHORTEST_SECONDS = 3.0
"""Between two shards a GPU may be idle while messages travel; 64 images last it under a second."""
SHARD_SECONDS = 300
"""Longest time for a shard: a killed worker loses its shard, which should be no more than five minutes of work."""

BATCH_ON_CPU = 1
BATCH_ON_CUDA = 8
"""Images of a batch by default; see `batch_size`."""

FIRST_BATCH_SECONDS = 1800.0
"""Least time limit for a batch in the teacher before any batch is done."""
IMAGE_SECONDS = 600.0
"""Time limit for each image of such a batch: ViT-H in float32 takes 64 s per image on two cores, and slower machines
exist."""
COMPILE_SECONDS = 3600.0
"""Time limit for torch.compile: generous, since the machine may be busy with other work."""
LEAST_BATCH_SECONDS = 300.0
"""Least time limit for a batch once others are done."""
SLOWER_THAN_SLOWEST = 20.0
"""Time limit for a batch in multiples of the slowest batch so far."""

_EFFICIENCY = 0.4
"""Speed of a ViT's forward pass as a share of a large matrix product's, roughly."""


def shard_size(images: int, workers: int, seconds_per_image: float, device_type: str = "cpu") -> int:
    """Choose the images per shard.

    Args:
        images: images in all.
        workers: workers that share them.
        seconds_per_image: teacher's time for one image on one worker.
        device_type: cpu or cuda.

    Returns:
        64, or 256 on a fast GPU; fewer if a shard would take over five minutes, or a worker would get fewer than two
        shards (one is decoded or written while the other is computed). At least 1.
    """
    fast = device_type == "cuda" and seconds_per_image * LARGEST_SHARD < SHORTEST_SECONDS
    largest = LARGEST_ON_FAST_GPUS if fast else LARGEST_SHARD
    by_time = int(SHARD_SECONDS / seconds_per_image) if seconds_per_image > 0 else largest
    by_workers = -(-images // (2 * workers))
    return max(1, min(largest, by_time, by_workers))


def batch_size(asked: int | None, device_type: str, shard_size: int) -> int:
    """Choose the images of a teacher batch.

    Args:
        asked: the user's choice; None for the default by device, which is small since more images per batch gain
            nothing on a CPU and little on a GPU.
        device_type: cpu or cuda.
        shard_size: upper bound, since a batch stays within its shard and empty slots cost as much as images.
    """
    return min(asked or (BATCH_ON_CPU if device_type == "cpu" else BATCH_ON_CUDA), shard_size)


def batch_timeout(batch_size: int, slowest: float | None) -> float:
    """Return the seconds after which a batch in the teacher counts as hung.

    The limit is generous, since a worker that is only slow would lose its shard.

    Args:
        batch_size: images of a batch.
        slowest: seconds of the slowest batch so far; None before the first.
    """
    if slowest is None:
        return max(FIRST_BATCH_SECONDS, IMAGE_SECONDS * batch_size)
    return max(LEAST_BATCH_SECONDS, SLOWER_THAN_SLOWEST * slowest)


def compile_timeout(batch_size: int) -> float:
    """Return the seconds after which torch.compile, with the batch that starts it, counts as hung."""
    return COMPILE_SECONDS + batch_timeout(batch_size, None)


def estimated_seconds(teacher: str, image_size: int, macs_per_second: float) -> float:
    """Estimate a worker's seconds for one image. Another package's teacher, of unknown cost, counts as the largest.

    Args:
        teacher: name of the teacher.
        image_size: side of the padded square, in pixels.
        macs_per_second: the worker's speed of matrix products, in multiply-accumulates per second.
    """
    info = TEACHERS.get(teacher) or max(TEACHERS.values(), key=lambda each: each.macs_at_1024)
    return info.macs_at_1024 * (image_size / 1024) ** 2 / (macs_per_second * _EFFICIENCY)


def measure_macs_per_second(device: torch.device, precision: str) -> float:
    """Measure a device of this machine by a square matrix product, the best of three.

    Args:
        device: CPU or CUDA device.
        precision: float32 or bfloat16.

    Returns:
        Multiply-accumulates per second.
    """
    side = 1024 if device.type == "cpu" else 4096
    matrix = torch.ones(side, side, dtype=getattr(torch, precision), device=device)
    best = float("inf")
    for _ in range(3):
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return side**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
