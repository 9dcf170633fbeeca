"""Groups of runs that differ only by their seed, and the spread of their results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .trial import DONE

SEED = "seed"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Spread of one number over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation (n - 1 in the denominator); None for a single seed."""
    lowest: float
    highest: float
    count: int
    """Number of seeds for which the number is defined."""

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Compute the spread of the finite values; None if there are none."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known:
            return None
        mean = math.fsum(known) / len(known)
        squares = math.fsum((value - mean) ** 2 for value in known)
        return cls(
            mean=mean,
            deviation=math.sqrt(squares / (len(known) - 1)) if len(known) > 1 else None,
            lowest=min(known),
            highest=max(known),
            count=len(known),
        )

    def text(self, digits: str) -> str:
        """Format the mean by the specification `digits`, followed by ± and the deviation, if there is one."""
        mean = format(self.mean, digits)
        return mean if self.deviation is None else f"{mean} ± {format(self.deviation, digits)}"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Finished runs that differ only by their seed."""

    options: Mapping[str, Any]
    """Options that the runs share."""
    outcomes: Sequence[Mapping[str, Any]]
    """Outcomes of `run_trial`."""

    def spread(self, *path: str) -> Spread | None:
        """Return the spread of the number at a path of keys in each outcome; None if it is undefined in all."""
        return Spread.of(_lookup(outcome, path) for outcome in self.outcomes)

    def verified(self, *path: str) -> Spread | None:
        """Return the spread of a number of `verify`, on the test store or, without one, on held-out rows."""
        return self.spread(verified_split(self.outcomes), *path)


def verified_split(outcomes: Iterable[Mapping[str, Any]]) -> str:
    """Return the key of the results of `verify` to report: "test" if all outcomes have it, else "val"."""
    return "test" if all("test" in outcome for outcome in outcomes) else "val"


def grouped(outcomes: Iterable[Mapping[str, Any]]) -> list[Group]:
    """Group finished outcomes by all options but the seed, in order of first occurrence."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for outcome in outcomes:
        if outcome["status"] == DONE:
            shared = {name: value for name, value in outcome["options"].items() if name != SEED}
            groups.setdefault(repr(sorted(shared.items())), []).append(outcome)
    return [
        Group(
            options={name: value for name, value in members[0]["options"].items() if name != SEED},
            outcomes=members,
        )
        for members in groups.values()
    ]


def varying(groups: Sequence[Group]) -> list[str]:
    """Return the options in which groups differ, among the groups that have the option."""
    values: dict[str, set[str]] = {}
    for group in groups:
        for name, value in group.options.items():
            values.setdefault(name, set()).add(repr(value))
    return [name for name, different in values.items() if len(different) > 1]


def _lookup(value: Any, path: Sequence[str]) -> float | None:
    for part in path:
        value = None if value is None else value.get(part)
    return value
