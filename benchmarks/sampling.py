"""Watching processes while they work: resident memory, open descriptors, time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import psutil


@dataclass(frozen=True)
class Sample:
    """After `images` images: wall time, and processor time of all the processes, in seconds since some moment;
    resident bytes and open descriptors of each process by its name."""

    images: int
    wall: float
    processor: float
    resident: Mapping[str, int]
    descriptors: Mapping[str, int]


class Watch:
    """Takes samples of processes; `samples` are in order."""

    def __init__(self, processes: Mapping[str, psutil.Process]) -> None:
        self.samples: list[Sample] = []
        self._processes = processes

    def look(self, images: int) -> None:
        """Take a sample."""
        resident, descriptors, processor = {}, {}, 0.0
        for name, process in self._processes.items():
            times = process.cpu_times()
            processor += times.user + times.system
            resident[name] = process.memory_info().rss
            descriptors[name] = process.num_fds()
        self.samples.append(Sample(images, time.perf_counter(), processor, resident, descriptors))


def worker_processes() -> dict[str, psutil.Process]:
    """dask's worker processes that this process has started, by name."""
    # Beside them there is multiprocessing's resource tracker, which has no part in the work.
    children = psutil.Process().children(recursive=True)
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return {f"worker {number}": worker for number, worker in enumerate(workers)}


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was seen over a stretch of images, `images` when it ended: by process the median of the resident bytes and
    the most descriptors; per image wall and processor time in seconds."""

    images: int
    resident: Mapping[str, float]
    descriptors: Mapping[str, int]
    wall: float
    processor: float


def curve(samples: Sequence[Sample], rows: int, points: int) -> list[Point]:
    """The samples over `rows` images as so many points, each of equally many images. A stretch in which no sample was
    taken has no point."""
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
        descriptors={name: max(s.descriptors[name] for s in stretch) for name in last.descriptors},
        wall=(last.wall - before.wall) / images,
        processor=(last.processor - before.processor) / images,
    )
