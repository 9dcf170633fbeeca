"""Two sides of a ratio, measured by turns in one run, and what is printed of them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from benchmarks.support.machine import machine

EMULATED = "this processor only emulates bfloat16: --emulated measures it all the same"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of a benchmark: a measured `value` that should be at least, or at most, `target`.

    `sides` tells what it was made from. `value` is None where it can't be measured here, and `sides` then tells why.
    """

    what: str
    value: float | None
    target: float
    at_least: bool = True
    sides: str

    @property
    def reached(self) -> bool | None:
        """Whether the target is; None where nothing was measured."""
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
    """The median seconds of each side over `rounds` rounds, in which each is called once, in turn.

    With `warm` each is called once more at first, which isn't counted: that call fills caches and allocators.
    `clock` tells wall time; `time.process_time` tells the processor's.
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
    """The value beside its target, in words."""
    wanted = f"{'>=' if figure.at_least else '<='} {figure.target:g}"
    if figure.value is None:
        return f"not measured, target {wanted}"
    return f"{figure.value:.3g}, target {wanted}: {'reached' if figure.reached else 'MISSED'}"
