"""Samples of running processes: memory, open descriptors, time; and their curve over many images."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import psutil

from benchmarks.support.memory import allocated, forget_peak, peak_resident


@dataclass(frozen=True, slots=True)
class Sample:
    """State of the processes after `images` images."""

    images: int
    wall: float
    """Seconds of wall time since a fixed moment."""
    processor: float
    """Seconds of processor time of all processes together."""
    resident: Mapping[str, int]
    """Process -> peak resident bytes since the sample before."""
    descriptors: Mapping[str, int]
    """Process -> open descriptors."""
    allocated: int | None
    """Bytes that the sampling process holds from malloc; None where the C library doesn't report them."""


class Watch:
    """Sampler of processes, which keeps samples at least `every` images apart in `samples`.

    Keeping a sample of every batch would itself be a growth of memory.
    """

    def __init__(self, processes: Mapping[str, psutil.Process], every: int) -> None:
        self._every = every
        self.samples: list[Sample] = []
        self._processes = processes

    def look(self, images: int) -> None:
        """Take a sample, unless the last one is less than `every` images back."""
        if self.samples and images < self.samples[-1].images + self._every:
            return
        resident, descriptors, processor = {}, {}, 0.0
        for name, process in self._processes.items():
            times = process.cpu_times()
            processor += times.user + times.system
            resident[name] = peak_resident(process.pid)
            forget_peak(process.pid)
            descriptors[name] = process.num_fds()
        self.samples.append(
            Sample(images, time.perf_counter(), processor, resident, descriptors, allocated())
        )


def worker_processes() -> dict[str, psutil.Process]:
    """Return dask's worker processes that this process has started, by name."""
    # multiprocessing's resource tracker is a child, too, and does none of the work.
    children = psutil.Process().children(recursive=True)
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return {f"worker {number}": worker for number, worker in enumerate(workers)}


@dataclass(frozen=True, kw_only=True)
class Point:
    """Summary of the samples over a stretch of images."""

    images: int
    """Images done at its end."""
    resident: Mapping[str, float]
    """Process -> median of the samples' peak resident bytes."""
    allocated: float | None
    """Median of the allocated bytes."""
    descriptors: Mapping[str, int]
    """Process -> most open descriptors."""
    wall: float
    """Seconds of wall time an image."""
    processor: float
    """Seconds of processor time an image."""


def curve(samples: Sequence[Sample], rows: int, points: int) -> list[Point]:
    """Summarise the samples over `rows` images in `points` stretches of equally many images.

    A stretch without a sample has no point.
    """
    stretches: list[list[Sample]] = [[] for _ in range(points)]
    for sample in samples:
        if sample.images:
            stretches[(sample.images - 1) * points // rows].append(sample)
    found, before = [], samples[0]
    for stretch in filter(None, stretches):
        if stretch[-1].images > before.images:
            found.append(_point(stretch, before))
            before = stretch[-1]
    return found


def _point(stretch: Sequence[Sample], before: Sample) -> Point:
    last = stretch[-1]
    images = last.images - before.images
    return Point(
        images=last.images,
        resident={name: median(s.resident[name] for s in stretch) for name in last.resident},
        allocated=None if last.allocated is None else median(s.allocated or 0 for s in stretch),
        descriptors={name: max(s.descriptors[name] for s in stretch) for name in last.descriptors},
        wall=(last.wall - before.wall) / images,
        processor=(last.processor - before.processor) / images,
    )
