"""Groups of runs that differ by their seed alone, and the spread of their results."""

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
        """Compute the spread of the values that are neither None nor NaN nor infinite; None without any."""
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
        """Return the mean in the format `digits`, with ± the deviation where there is one."""
        mean = format(self.mean, digits)
        return mean if self.deviation is None else f"{mean} ± {format(self.deviation, digits)}"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Finished runs that differ by their seed alone."""

    options: Mapping[str, Any]
    """Options that they share."""
    outcomes: Sequence[Mapping[str, Any]]
    """As `run_trial` returns them."""

    def spread(self, *path: str) -> Spread | None:
        """Return the spread of the number to which these keys lead in each outcome."""
        return Spread.of(_lookup(outcome, path) for outcome in self.outcomes)

    def verified(self, *path: str) -> Spread | None:
        """Return the spread of one of verify's numbers, on the test store or, without one, on held-out rows."""
        return self.spread(verified_split(self.outcomes), *path)


def verified_split(outcomes: Iterable[Mapping[str, Any]]) -> str:
    """Return the key of verify's results to report: "test" where all outcomes have a test store's, else "val"."""
    return "test" if all("test" in outcome for outcome in outcomes) else "val"


def grouped(outcomes: Iterable[Mapping[str, Any]]) -> list[Group]:
    """Group finished outcomes by all options but the seed, in the order of each group's first."""
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
    """Return the options in which groups differ; a group to which an option doesn't apply lacks it."""
    values: dict[str, set[str]] = {}
    for group in groups:
        for name, value in group.options.items():
            values.setdefault(name, set()).add(repr(value))
    return [name for name, different in values.items() if len(different) > 1]


def _lookup(value: Any, path: Sequence[str]) -> float | None:
    for part in path:
        value = None if value is None else value.get(part)
    return value
