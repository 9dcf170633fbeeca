"""Where to hit: places chosen among the system calls of an undisturbed run of the same process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.kills.strace import KILL, Injection
from faults.kills.trace import Event, Trace, kind_of


@dataclass(frozen=True)
class InjectionPoint:
    """An injection, and what it will hit if the process does as it did before."""

    injection: Injection
    phase: str

    @classmethod
    def at(cls, event: Event, effect: str = KILL) -> InjectionPoint:
        """The point at an event of a trace."""
        return cls(Injection(event.call, event.ordinal, effect), event.stage)


def phase_of(event: Event, root: Path, role: str) -> str:
    """Where in the job an event is: its stage and what it acts on."""
    return f"{event.stage or role}-{kind_of(event.path, root) or 'elsewhere'}"


def injection_points(
    trace: Trace, root: Path, role: str, *, calls: Collection[str], effects: Sequence[str] = (KILL,)
) -> list[InjectionPoint]:
    """Every point of a trace, in the order of the job, that concerns the store or run at `root`.

    An ordinal is counted in each thread: a call that another thread reaches first can't be hit, and isn't listed.
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
    """At most `number` of the points: one of every (call, phase) by turns, the first ones, then the last ones, then
    those in between."""
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
    # With few points to spend, they are taken from all over the job.
    return [chosen[(2 * place + 1) * len(groups) // (2 * number)] for place in range(number)]


def _take(group: list[InjectionPoint], turn: int) -> InjectionPoint:
    return group.pop({0: 0, 1: -1}.get(turn, len(group) // 2))
