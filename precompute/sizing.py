"""How large a shard and a batch should be, and how long a batch may take, from what the teacher costs."""

from __future__ import annotations

import time

import torch

from ..sam.registry import TEACHERS

LARGEST_SHARD = 64
SHARD_SECONDS = 300
"""A shard is what a kill loses: no more than five minutes of work."""

BATCH_ON_CPU = 1
BATCH_ON_CUDA = 8

FIRST_BATCH_SECONDS = 1800.0
IMAGE_SECONDS = 600.0
"""In the teacher, before any batch is through: ViT-H in float32 takes 64 s an image on two cores, and slower ones
exist."""
COMPILE_SECONDS = 3600.0
"""For torch.compile to translate a teacher: generous, since the machine may be busy with anything."""
LEAST_BATCH_SECONDS = 300.0
SLOWER_THAN_SLOWEST = 20.0

_EFFICIENCY = 0.4
"""Of a matrix product's speed that a ViT's forward pass reaches, roughly."""


def shard_size(images: int, workers: int, seconds_per_image: float) -> int:
    """Images per shard: 64, less where a shard would take over five minutes or leave a worker without two of its
    own (one decodes or is written while the other computes)."""
    by_time = int(SHARD_SECONDS / seconds_per_image) if seconds_per_image > 0 else LARGEST_SHARD
    by_workers = -(-images // (2 * workers))
    return max(1, min(LARGEST_SHARD, by_time, by_workers))


def batch_size(asked: int | None, device_type: str, shard_size: int) -> int:
    """Images that the teacher takes at once. By default few: on a CPU more gain nothing, on a GPU little. Never more
    than a shard has, since a batch stays within its shard and empty slots cost as much as images."""
    return min(asked or (BATCH_ON_CPU if device_type == "cpu" else BATCH_ON_CUDA), shard_size)


def batch_timeout(batch_size: int, slowest: float | None) -> float:
    """Seconds after which a batch in the teacher is taken for one that hangs, given how long the slowest batch took.
    Generous: a worker that is only slow loses the shard it is at."""
    if slowest is None:
        return max(FIRST_BATCH_SECONDS, IMAGE_SECONDS * batch_size)
    return max(LEAST_BATCH_SECONDS, SLOWER_THAN_SLOWEST * slowest)


def compile_timeout(batch_size: int) -> float:
    """Seconds after which torch.compile, with the batch by which it is set to work, is taken for one that hangs."""
    return COMPILE_SECONDS + batch_timeout(batch_size, None)


def estimated_seconds(teacher: str, image_size: int, macs_per_second: float) -> float:
    """Roughly what one image costs a worker with the speed `macs_per_second` of matrix products."""
    return TEACHERS[teacher].macs_at_1024 * (image_size / 1024) ** 2 / (macs_per_second * _EFFICIENCY)


def macs_per_second(device: torch.device, precision: str) -> float:
    """Multiply-accumulates per second of a matrix product on this machine's device, measured."""
    side = 1024 if device.type == "cpu" else 4096
    matrix = torch.ones(side, side, dtype=getattr(torch, precision), device=device)
    best = float("inf")
    for _ in range(3):
        _wait_for(device)
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        _wait_for(device)
        best = min(best, time.perf_counter() - start)
    return side**3 / best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
