"""Runs that differ by their seed alone, and how far apart they came out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .trial import DONE

SEED = "seed"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of one number over the seeds: `deviation` is the sample's, n - 1 in its denominator; None for a single seed."""

    mean: float
    deviation: float | None
    lowest: float
    highest: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Of the values that are defined; None where none is."""
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
        """The mean, and ± the deviation where there is one."""
        mean = format(self.mean, digits)
        return mean if self.deviation is None else f"{mean} ± {format(self.deviation, digits)}"


@dataclass(frozen=True, kw_only=True)
class Group:
    """The finished runs that differ by their seed alone. `options` are those that they share."""

    options: Mapping[str, Any]
    outcomes: Sequence[Mapping[str, Any]]

    def spread(self, *path: str) -> Spread | None:
        """Of the number to which the path leads in each outcome."""
        return Spread.of(_followed(outcome, path) for outcome in self.outcomes)

    def judged(self, *path: str) -> Spread | None:
        """Of one of verify's numbers: on the test store where there is one, else on the held-out rows."""
        return self.spread(judged_by(self.outcomes), *path)


def judged_by(outcomes: Iterable[Mapping[str, Any]]) -> str:
    """Whose numbers count: "test" where all outcomes have a test store's, else "val"."""
    return "test" if all("test" in outcome for outcome in outcomes) else "val"


def grouped(outcomes: Iterable[Mapping[str, Any]]) -> list[Group]:
    """The groups in the order of their first outcome; outcomes that aren't done are left out."""
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
    """The options in which the groups differ, among those for which they mean something."""
    values: dict[str, set[str]] = {}
    for group in groups:
        for name, value in group.options.items():
            values.setdefault(name, set()).add(repr(value))
    return [name for name, different in values.items() if len(different) > 1]


def _followed(value: Any, path: Sequence[str]) -> float | None:
    for part in path:
        value = None if value is None else value.get(part)
    return value
