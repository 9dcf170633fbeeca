"""EIO and ENOSPC from writing, syncing and renaming: a clear error, or a job that goes on; a rerun completes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.ledger import Ledger
from faults.points import points, spread
from faults.scenarios import scenarios
from faults.scene import Scene
from faults.strikes import Struck, strike_coordinator, strike_worker, trace_coordinator, trace_worker
from faults.tracing import RENAMES, SYNCS, WRITES
from faults.training import strike_trainer, trace_trainer, trainings

pytestmark = pytest.mark.fault

CALLS = (*WRITES, *SYNCS, *RENAMES)
ERRORS = ("EIO", "ENOSPC")


def assert_all_well(struck: list[Struck]) -> None:
    assert [line for strike in struck for line in strike.complaints] == []
    assert sum(strike.fired for strike in struck) >= 0.9 * len(struck)


@pytest.mark.parametrize(("name", "few", "many"), [("new", 2, 70), ("extend", 1, 40), ("repair", 1, 20)])
def test_a_command_that_cannot_write_says_so_and_a_rerun_completes_the_store(
    scene: Scene, ledger: Ledger, full: bool, name: str, few: int, many: int
) -> None:
    scenario = scenarios(scene)[name]()
    trace, store = trace_coordinator(scenario)
    chosen = spread(points(trace, store, scenario.role, calls=CALLS, effects=ERRORS), many if full else few)
    assert_all_well([strike_coordinator(scenario, point, ledger) for point in chosen])


@pytest.mark.parametrize(("name", "few", "many"), [("new-int8", 2, 16)])
def test_a_worker_that_cannot_write_says_so_and_a_rerun_completes_the_store(
    scene: Scene, ledger: Ledger, full: bool, name: str, few: int, many: int
) -> None:
    scenario = scenarios(scene)[name]()
    trace, store = trace_worker(scenario)
    chosen = spread(points(trace, store, "worker", calls=CALLS, effects=ERRORS), many if full else few)
    assert_all_well([strike_worker(scenario, point, ledger) for point in chosen])


@pytest.mark.parametrize(("name", "few", "many"), [("new", 2, 60)])
def test_a_trainer_that_cannot_write_says_so_and_a_rerun_goes_on(
    scene: Scene, store: Path, ledger: Ledger, full: bool, name: str, few: int, many: int
) -> None:
    training = trainings(scene, store)[name]()
    trace, run = trace_trainer(training)
    chosen = spread(points(trace, run, "trainer", calls=CALLS, effects=ERRORS), many if full else few)
    assert_all_well([strike_trainer(training, point, ledger) for point in chosen])
