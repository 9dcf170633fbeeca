"""kill -9 of a worker at its system calls: another takes its place and the job goes on to the same store."""

from __future__ import annotations

import pytest
from faults.ledger import Ledger
from faults.points import points, spread
from faults.scenarios import scenarios
from faults.scene import Scene
from faults.strikes import strike_worker, trace_worker
from faults.tracing import CALLS

pytestmark = pytest.mark.fault


@pytest.mark.parametrize(("name", "few", "many"), [("new", 2, 20), ("new-int8", 2, 30), ("resume", 1, 20)])
def test_a_job_whose_worker_is_killed_goes_on_with_another(
    scene: Scene, ledger: Ledger, full: bool, name: str, few: int, many: int
) -> None:
    scenario = scenarios(scene)[name]()
    trace, store = trace_worker(scenario)
    chosen = spread(points(trace, store, "worker", calls=CALLS), many if full else few)
    struck = [strike_worker(scenario, point, ledger) for point in chosen]
    assert [line for strike in struck for line in strike.complaints] == []
    assert sum(strike.fired for strike in struck) >= 0.9 * len(chosen)
