"""kill -9 of a trainer at its system calls: a rerun equals an undisturbed run bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.fault_log import FaultLog
from faults.kills.cluster import FaultCluster
from faults.kills.injection_points import injection_points, sample_points
from faults.kills.strace import CALLS
from faults.kills.training import inject_into_trainer, trace_trainer, trainings

pytestmark = pytest.mark.fault


@pytest.mark.parametrize(("name", "few", "many"), [("new", 4, 90), ("resume", 2, 40)])
def test_a_trainer_killed_anywhere_ends_as_if_it_had_never_been(
    cluster: FaultCluster, store: Path, fault_log: FaultLog, full: bool, name: str, few: int, many: int
) -> None:
    training = trainings(cluster, store)[name]()
    trace, run = trace_trainer(training)
    chosen = sample_points(injection_points(trace, run, "trainer", calls=CALLS), many if full else few)
    results = [inject_into_trainer(training, point, fault_log) for point in chosen]
    assert [line for result in results for line in result.complaints] == []
    assert sum(result.fired for result in results) >= 0.9 * len(chosen)
