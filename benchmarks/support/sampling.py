"""Watching processes while they work: memory, open descriptors, time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import psutil

from benchmarks.support.memory import allocated, forget_peak, peak_resident


@dataclass(frozen=True, slots=True)
class Sample:
    """After `images` images: wall time, and processor time of all the processes, in seconds since some moment;
    of each process, by its name, the most bytes that were resident since the sample before, and its open descriptors;
    `allocated` bytes of the process that watches, None where the C library doesn't tell."""

    images: int
    wall: float
    processor: float
    resident: Mapping[str, int]
    descriptors: Mapping[str, int]
    allocated: int | None


class Watch:
    """Takes samples of processes, at least `every` images apart; `samples` are in order.

    A sample of each batch, kept, would be the very growth that is looked for.
    """

    def __init__(self, processes: Mapping[str, psutil.Process], every: int) -> None:
        self._every = every
        self.samples: list[Sample] = []
        self._processes = processes

    def look(self, images: int) -> None:
        """Take a sample, if it is time for one."""
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
    """dask's worker processes that this process has started, by name."""
    # Beside them there is multiprocessing's resource tracker, which has no part in the work.
    children = psutil.Process().children(recursive=True)
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return {f"worker {number}": worker for number, worker in enumerate(workers)}


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was seen over a stretch of images, `images` when it ended: by process the median of its samples'
    resident bytes and the most descriptors; the median of the allocated bytes; per image wall and processor time in
    seconds."""

    images: int
    resident: Mapping[str, float]
    allocated: float | None
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
        allocated=None if last.allocated is None else median(s.allocated or 0 for s in stretch),
        descriptors={name: max(s.descriptors[name] for s in stretch) for name in last.descriptors},
        wall=(last.wall - before.wall) / images,
        processor=(last.processor - before.processor) / images,
    )
