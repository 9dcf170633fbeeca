"""EIO and ENOSPC from write, fsync and rename: a clear error or a job that continues; a rerun completes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.fault_log import FaultLog
from faults.kills.cluster import FaultCluster
from faults.kills.inject import (
    InjectionResult,
    inject_into_coordinator,
    inject_into_worker,
    trace_coordinator,
    trace_worker,
)
from faults.kills.injection_points import injection_points, sample_points
from faults.kills.scenarios import scenarios
from faults.kills.strace import RENAMES, SYNCS, WRITES
from faults.kills.training import inject_into_trainer, trace_trainer, trainings

pytestmark = pytest.mark.fault

CALLS = (*WRITES, *SYNCS, *RENAMES)
ERRORS = ("EIO", "ENOSPC")


def assert_no_complaints(results: list[InjectionResult]) -> None:
    """Assert that nothing was lost, and that nearly all faults fired."""
    assert [line for result in results for line in result.complaints] == []
    assert sum(result.fired for result in results) >= 0.9 * len(results)


@pytest.mark.parametrize(("name", "few", "many"), [("new", 2, 70), ("extend", 1, 40), ("repair", 1, 20)])
def test_a_command_that_cannot_write_reports_it_and_a_rerun_completes_the_store(
    cluster: FaultCluster, fault_log: FaultLog, full: bool, name: str, few: int, many: int
) -> None:
    scenario = scenarios(cluster)[name]()
    trace, store = trace_coordinator(scenario)
    chosen = sample_points(
        injection_points(trace, store, scenario.role, calls=CALLS, effects=ERRORS), many if full else few
    )
    assert_no_complaints([inject_into_coordinator(scenario, point, fault_log) for point in chosen])


@pytest.mark.parametrize(("name", "few", "many"), [("new-int8", 2, 16)])
def test_a_worker_that_cannot_write_reports_it_and_a_rerun_completes_the_store(
    cluster: FaultCluster, fault_log: FaultLog, full: bool, name: str, few: int, many: int
) -> None:
    scenario = scenarios(cluster)[name]()
    trace, store = trace_worker(scenario)
    chosen = sample_points(
        injection_points(trace, store, "worker", calls=CALLS, effects=ERRORS), many if full else few
    )
    assert_no_complaints([inject_into_worker(scenario, point, fault_log) for point in chosen])


@pytest.mark.parametrize(("name", "few", "many"), [("new", 2, 60)])
def test_a_trainer_that_cannot_write_reports_it_and_a_rerun_resumes(
    cluster: FaultCluster, store: Path, fault_log: FaultLog, full: bool, name: str, few: int, many: int
) -> None:
    training = trainings(cluster, store)[name]()
    trace, run = trace_trainer(training)
    chosen = sample_points(
        injection_points(trace, run, "trainer", calls=CALLS, effects=ERRORS), many if full else few
    )
    assert_no_complaints([inject_into_trainer(training, point, fault_log) for point in chosen])
