"""kill -9 at random times, after the first commit or checkpoint."""

from __future__ import annotations

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

pytestmark = pytest.mark.fault


def assert_all_well(struck: list[Struck]) -> None:
    assert [line for strike in struck for line in strike.complaints] == []
    assert any(strike.fired for strike in struck)


def test_processes_of_a_job_may_die_at_any_time(scene: Scene, ledger: Ledger, full: bool) -> None:
    scenario = scenarios(scene)["new"]()

    def start() -> tuple:
        store = scenario.prepared()
        return scenario.start(store), store.with_name("stages")

    seconds = measured(start, scene.zygote, "-commit")
    draws = range(12 if full else 1)
    assert_all_well(
        [
            *(strike_coordinator_sometime(scenario, draw, seconds, ledger) for draw in draws),
            *(strike_coordinator_sometime(scenario, draw, seconds, ledger, both=True) for draw in draws),
            *(strike_worker_sometime(scenario, draw, seconds, ledger) for draw in draws),
        ]
    )


def test_a_trainer_may_die_at_any_time(scene: Scene, store: Path, ledger: Ledger, full: bool) -> None:
    training = trainings(scene, store)["new"]()

    def start() -> tuple:
        run = training.prepared()
        return training.start(run), run.with_name("stages")

    seconds = measured(start, scene.zygote, "-checkpoint")
    draws = range(16 if full else 1)
    assert_all_well([strike_trainer_sometime(training, draw, seconds, ledger) for draw in draws])
