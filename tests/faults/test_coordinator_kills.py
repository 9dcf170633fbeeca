"""kill -9 of the coordinator, or of a repair, at its system calls: what was committed stays, a rerun completes the
store."""

from __future__ import annotations

import pytest
from faults.ledger import Ledger
from faults.points import points, spread
from faults.scenarios import scenarios
from faults.scene import Scene
from faults.strikes import strike_coordinator, trace_coordinator
from faults.tracing import CALLS

pytestmark = pytest.mark.fault


@pytest.mark.parametrize(
    ("name", "few", "many"),
    [("new", 4, 120), ("extend", 3, 60), ("retry", 1, 30), ("resume", 1, 30), ("repair", 1, 30)],
)
def test_a_command_killed_anywhere_loses_nothing_that_was_committed(
    scene: Scene, ledger: Ledger, full: bool, name: str, few: int, many: int
) -> None:
    scenario = scenarios(scene)[name]()
    trace, store = trace_coordinator(scenario)
    chosen = spread(points(trace, store, scenario.role, calls=CALLS), many if full else few)
    struck = [strike_coordinator(scenario, point, ledger) for point in chosen]
    assert [line for strike in struck for line in strike.complaints] == []
    assert sum(strike.fired for strike in struck) >= 0.9 * len(chosen)
