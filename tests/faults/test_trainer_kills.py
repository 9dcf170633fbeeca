"""kill -9 of the trainer at its system calls: a rerun is the run that was never killed, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.ledger import Ledger
from faults.points import points, spread
from faults.scene import Scene
from faults.tracing import CALLS
from faults.training import strike_trainer, trace_trainer, trainings

pytestmark = pytest.mark.fault


@pytest.mark.parametrize(("name", "few", "many"), [("new", 4, 90), ("resume", 2, 40)])
def test_a_trainer_killed_anywhere_ends_as_if_it_had_never_been(
    scene: Scene, store: Path, ledger: Ledger, full: bool, name: str, few: int, many: int
) -> None:
    training = trainings(scene, store)[name]()
    trace, run = trace_trainer(training)
    chosen = spread(points(trace, run, "trainer", calls=CALLS), many if full else few)
    struck = [strike_trainer(training, point, ledger) for point in chosen]
    assert [line for strike in struck for line in strike.complaints] == []
    assert sum(strike.fired for strike in struck) >= 0.9 * len(chosen)
