"""kill -9 at random times, after the first commit or checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from faults.fault_log import FaultLog
from faults.kills.cluster import FaultCluster
from faults.kills.fork_server import Process
from faults.kills.inject import InjectionResult
from faults.kills.random_kills import (
    kill_coordinator_at_random,
    kill_trainer_at_random,
    kill_worker_at_random,
    seconds_after,
)
from faults.kills.scenarios import scenarios
from faults.kills.training import trainings

pytestmark = pytest.mark.fault


def kill_often(kill: Callable[[int], InjectionResult], times: int) -> list[str]:
    """Kill until `times` kills have fired (a process may end first), and return their complaints."""
    results: list[InjectionResult] = []
    while sum(result.fired for result in results) < times:
        assert len(results) < 20 * times, "processes end before they are hit"
        results.append(kill(len(results)))
    return [line for result in results for line in result.complaints]


def test_processes_of_a_job_may_die_at_any_time(
    cluster: FaultCluster, fault_log: FaultLog, full: bool
) -> None:
    scenario = scenarios(cluster)["new"]()

    def start() -> tuple[Process, Path]:
        store = scenario.prepared()
        return scenario.start(store), store.with_name("stages")

    seconds = seconds_after(start, cluster.fork_server, "-commit")
    times = 12 if full else 1
    kills: list[Callable[[int], InjectionResult]] = [
        lambda draw: kill_coordinator_at_random(scenario, draw, seconds, fault_log),
        lambda draw: kill_coordinator_at_random(scenario, draw, seconds, fault_log, both=True),
        lambda draw: kill_worker_at_random(scenario, draw, seconds, fault_log),
    ]
    assert [line for kill in kills for line in kill_often(kill, times)] == []


def test_a_trainer_may_die_at_any_time(
    cluster: FaultCluster, store: Path, fault_log: FaultLog, full: bool
) -> None:
    training = trainings(cluster, store)["new"]()

    def start() -> tuple[Process, Path]:
        run = training.prepared()
        return training.start(run), run.with_name("stages")

    seconds = seconds_after(start, cluster.fork_server, "-checkpoint")
    times = 16 if full else 1
    assert kill_often(lambda draw: kill_trainer_at_random(training, draw, seconds, fault_log), times) == []
