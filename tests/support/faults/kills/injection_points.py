"""Injection points: system calls of an undisturbed run at which the same process is hit later."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.kills.strace import KILL, Injection
from faults.kills.trace import Event, Trace, kind_of


@dataclass(frozen=True)
class InjectionPoint:
    """Injection, and the phase of the job that it hits if the process repeats its calls."""

    injection: Injection
    phase: str

    @classmethod
    def at(cls, event: Event, effect: str = KILL) -> InjectionPoint:
        """Return the point at an event of a trace."""
        return cls(Injection(event.call, event.ordinal, effect), event.stage)


def phase_of(event: Event, root: Path, role: str) -> str:
    """Return the phase of an event: its stage (or the process's role) and the kind of its file."""
    return f"{event.stage or role}-{kind_of(event.path, root) or 'elsewhere'}"


def injection_points(
    trace: Trace, root: Path, role: str, *, calls: Collection[str], effects: Sequence[str] = (KILL,)
) -> list[InjectionPoint]:
    """Return all points of a trace that concern the store or run at `root`, in the order of the job.

    strace counts ordinals in each thread: a call whose ordinal another thread reaches first cannot be hit, so it is
    not listed.
    """
    first: dict[tuple[str, int], Event] = {}
    for event in trace.events:
        first.setdefault((event.call, event.ordinal), event)
    found = []
    for event in trace.events:
        if event.call not in calls or first[event.call, event.ordinal] is not event:
            continue
        if kind_of(event.path, root) is None:
            continue
        phase = phase_of(event, root, role)
        found += [InjectionPoint(Injection(event.call, event.ordinal, effect), phase) for effect in effects]
    return found


def sample_points(everything: Iterable[InjectionPoint], number: int) -> list[InjectionPoint]:
    """Return at most `number` points: the first of every (call, phase), then the last ones, then those between."""
    groups: dict[tuple[str, str], list[InjectionPoint]] = defaultdict(list)
    for point in everything:
        groups[point.injection.name, point.phase].append(point)
    chosen: list[InjectionPoint] = []
    for turn in range(max(map(len, groups.values()), default=0)):
        for group in groups.values():
            if group:
                chosen.append(_take(group, turn))
    if number >= len(groups):
        return chosen[:number]
    # Few points are spread over the whole job.
    return [chosen[(2 * place + 1) * len(groups) // (2 * number)] for place in range(number)]


def _take(group: list[InjectionPoint], turn: int) -> InjectionPoint:
    return group.pop({0: 0, 1: -1}.get(turn, len(group) // 2))
