"""kill -9 of a worker at its system calls: another replaces it, and the job writes the same store."""

from __future__ import annotations

import pytest
from faults.fault_log import FaultLog
from faults.kills.cluster import FaultCluster
from faults.kills.inject import inject_into_worker, trace_worker
from faults.kills.injection_points import injection_points, sample_points
from faults.kills.scenarios import scenarios
from faults.kills.strace import CALLS

pytestmark = pytest.mark.fault


@pytest.mark.parametrize(("name", "few", "many"), [("new", 2, 20), ("new-int8", 2, 30), ("resume", 1, 20)])
def test_a_job_whose_worker_is_killed_continues_with_another(
    cluster: FaultCluster, fault_log: FaultLog, full: bool, name: str, few: int, many: int
) -> None:
    scenario = scenarios(cluster)[name]()
    trace, store = trace_worker(scenario)
    chosen = sample_points(injection_points(trace, store, "worker", calls=CALLS), many if full else few)
    results = [inject_into_worker(scenario, point, fault_log) for point in chosen]
    assert [line for result in results for line in result.complaints] == []
    assert sum(result.fired for result in results) >= 0.9 * len(chosen)
