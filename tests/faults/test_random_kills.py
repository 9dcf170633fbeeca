"""kill -9 at random times, after the first commit or checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from faults.ledger import Ledger
from faults.moments import (
    measured,
    strike_coordinator_sometime,
    strike_trainer_sometime,
    strike_worker_sometime,
)
from faults.scenarios import scenarios
from faults.scene import Scene
from faults.strikes import Struck
from faults.training import trainings
from faults.zygote import Process

pytestmark = pytest.mark.fault


def strike_often(strike: Callable[[int], Struck], times: int) -> list[str]:
    """Complaints of as many strikes as it takes until `times` have fired: what ends before its moment isn't hit."""
    struck: list[Struck] = []
    while sum(one.fired for one in struck) < times:
        assert len(struck) < 20 * times, "processes end before they are hit"
        struck.append(strike(len(struck)))
    return [line for one in struck for line in one.complaints]


def test_processes_of_a_job_may_die_at_any_time(scene: Scene, ledger: Ledger, full: bool) -> None:
    scenario = scenarios(scene)["new"]()

    def start() -> tuple[Process, Path]:
        store = scenario.prepared()
        return scenario.start(store), store.with_name("stages")

    seconds = measured(start, scene.zygote, "-commit")
    times = 12 if full else 1
    strikes: list[Callable[[int], Struck]] = [
        lambda draw: strike_coordinator_sometime(scenario, draw, seconds, ledger),
        lambda draw: strike_coordinator_sometime(scenario, draw, seconds, ledger, both=True),
        lambda draw: strike_worker_sometime(scenario, draw, seconds, ledger),
    ]
    assert [line for strike in strikes for line in strike_often(strike, times)] == []


def test_a_trainer_may_die_at_any_time(scene: Scene, store: Path, ledger: Ledger, full: bool) -> None:
    training = trainings(scene, store)["new"]()

    def start() -> tuple[Process, Path]:
        run = training.prepared()
        return training.start(run), run.with_name("stages")

    seconds = measured(start, scene.zygote, "-checkpoint")
    times = 16 if full else 1
    assert strike_often(lambda draw: strike_trainer_sometime(training, draw, seconds, ledger), times) == []
