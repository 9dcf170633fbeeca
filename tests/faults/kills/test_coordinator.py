"""kill -9 of a coordinator or a repair at its system calls: commits survive, and a rerun completes the store."""

from __future__ import annotations

import pytest
from faults.fault_log import FaultLog
from faults.kills.cluster import FaultCluster
from faults.kills.inject import inject_into_coordinator, trace_coordinator
from faults.kills.injection_points import injection_points, sample_points
from faults.kills.scenarios import scenarios
from faults.kills.strace import CALLS

pytestmark = pytest.mark.fault


@pytest.mark.parametrize(
    ("name", "few", "many"),
    [("new", 4, 120), ("extend", 3, 60), ("retry", 1, 30), ("resume", 1, 30), ("repair", 1, 30)],
)
def test_a_command_killed_anywhere_loses_nothing_that_was_committed(
    cluster: FaultCluster, fault_log: FaultLog, full: bool, name: str, few: int, many: int
) -> None:
    scenario = scenarios(cluster)[name]()
    trace, store = trace_coordinator(scenario)
    chosen = sample_points(injection_points(trace, store, scenario.role, calls=CALLS), many if full else few)
    results = [inject_into_coordinator(scenario, point, fault_log) for point in chosen]
    assert [line for result in results for line in result.complaints] == []
    assert sum(result.fired for result in results) >= 0.9 * len(chosen)
