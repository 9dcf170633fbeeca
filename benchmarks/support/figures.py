"""Figures of a benchmark: timing of the compared sides in turn, targets, and the report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch

from benchmarks.support.machine import machine

EMULATED = "this processor only emulates bfloat16: --emulated measures it anyway"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of a benchmark: a measured value and its target."""

    what: str
    """Name of the figure."""
    value: float | None
    """None where it can't be measured on this machine."""
    target: float
    at_least: bool = True
    """True if the value should be at least the target, False if at most."""
    sides: str
    """Numbers that the value was computed from, or the reason why there is none."""

    @property
    def reached(self) -> bool | None:
        """True if the value meets its target; None where nothing was measured."""
        if self.value is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


def by_turns(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Call the sides in turn, and return the median seconds of each.

    Args:
        sides: name -> call to be timed.
        rounds: number of timed calls of each side.
        warm: call each side once before, untimed, to fill caches and allocators.
        clock: wall time; `time.process_time` is the processor's.
    """
    if warm:
        for call in sides.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            began = clock()
            call()
            seconds[name].append(clock() - began)
    return {name: median(times) for name, times in seconds.items()}


def seconds_each(call: Callable[[], object], device: torch.device, count: int) -> float:
    """Return the seconds of one of `count` calls made back to back: on a GPU by its own clock, without waits between.

    Args:
        call: call to be timed; warmed up before.
        device: device that computes.
        count: number of calls, 1 or more.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - began) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record(torch.cuda.current_stream(device))
    for _ in range(count):
        call()
    end.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000 / count


def report(figures: Sequence[Figure], notes: Sequence[str], *, as_json: bool) -> None:
    """Print the machine, the figures with their targets, and the notes; with `as_json` as one JSON object."""
    about = machine()
    if as_json:
        lines = [asdict(figure) | {"reached": figure.reached} for figure in figures]
        json.dump({"machine": about, "figures": lines, "notes": list(notes)}, sys.stdout)
        print()
        return
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print()
    width = max((len(figure.what) for figure in figures), default=0)
    for figure in figures:
        print(f"{figure.what:{width}}  {verdict(figure)}  ({figure.sides})")
    print("\n".join(["", *notes]).rstrip())


def verdict(figure: Figure) -> str:
    """Return the value, the target, and whether it was reached, as text."""
    wanted = f"{'>=' if figure.at_least else '<='} {figure.target:g}"
    if figure.value is None:
        return f"not measured, target {wanted}"
    return f"{figure.value:.3g}, target {wanted}: {'reached' if figure.reached else 'MISSED'}"
