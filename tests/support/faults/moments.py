"""kill -9 at times drawn at random, after the first commit or checkpoint, wherever the process is then."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from faults.ledger import Ledger
from faults.points import Point
from faults.recovery import recovered, wrong_reads
from faults.scenarios import Scenario
from faults.strikes import Struck, promised_keys
from faults.tracing import Injection
from faults.training import Training, recover_training
from faults.zygote import GUARD_SECONDS, Process, Zygote


def moment(draw: int, role: str) -> Point:
    """For the ledger."""
    return Point(Injection("time", draw), f"{role}-random")


def wait_for(zygote: Zygote, process: Process, stages: Path, stage: str, draw: int, within: float) -> None:
    """Until the stage has been reached once, and then a part of `within` seconds more, by the number `draw`: up to
    two thirds, since processes that end before don't count."""
    deadline = time.monotonic() + GUARD_SECONDS
    while zygote.running(process) and not (stages.exists() and stage in stages.read_text()):
        assert time.monotonic() < deadline, process.said()
        time.sleep(0.002)
    time.sleep(random.Random(draw).uniform(0, within * 2 / 3))


def strike_coordinator_sometime(
    scenario: Scenario, draw: int, seconds: float, ledger: Ledger, *, both: bool = False
) -> Struck:
    """Kill the coordinator (with `both`, its worker too); undisturbed, it goes on for about `seconds` after the first
    commit."""
    scene, store, point = scenario.scene, scenario.prepared(), moment(draw, "coordinator")
    scene.ensure_worker()
    process = scenario.start(store)
    wait_for(scene.zygote, process, store.with_name("stages"), "-commit", draw, seconds)
    if both:
        scene.kill_worker()
    scene.zygote.kill(process)
    code = scene.zygote.wait(process)
    outcome = recovered(
        store,
        scenario.undisturbed,
        lambda: scenario.rerun(store),
        promised=promised_keys(store.with_name("stages"), store),
        sessions=[process.session],
    )
    role = "coordinator and worker" if both else "coordinator"
    _record(ledger, draw, role, fired=code == -9, lost=len(outcome.missing), wrong=len(outcome.wrong))
    return Struck(code == -9, [f"{point}: {what} {found}" for what, found in vars(outcome).items() if found])


def strike_worker_sometime(scenario: Scenario, draw: int, seconds: float, ledger: Ledger) -> Struck:
    """Kill the worker and start another: the job goes on."""
    scene, store, point = scenario.scene, scenario.prepared(), moment(draw, "worker")
    scene.start_worker()
    process = scenario.start(store)
    wait_for(scene.zygote, process, store.with_name("stages"), "-commit", draw, seconds)
    fired = scene.zygote.running(process)
    scene.kill_worker()
    wrong = wrong_reads(store, scenario.undisturbed)
    scene.ensure_worker()
    code = scene.zygote.wait(process)
    outcome = recovered(store, scenario.undisturbed, _nothing, sessions=[process.session])
    _record(
        ledger, draw, "worker", fired=fired, lost=len(outcome.missing), wrong=len(outcome.wrong) + len(wrong)
    )
    complaints = [f"{what} {found}" for what, found in vars(outcome).items() if found]
    complaints += [] if code == 0 else [f"the job ended with {code}: {process.said()[-500:]}"]
    return Struck(fired, [f"{point}: {line}" for line in complaints])


def strike_trainer_sometime(training: Training, draw: int, seconds: float, ledger: Ledger) -> Struck:
    """Kill the trainer after its first checkpoint."""
    run, zygote = training.prepared(), training.scene.zygote
    process = training.start(run)
    wait_for(zygote, process, run.with_name("stages"), "-checkpoint", draw, seconds)
    zygote.kill(process)
    fired = zygote.wait(process) == -9
    return recover_training(training, run, process, moment(draw, "trainer"), fired, [], ledger)


def measured(start: Callable[[], tuple[Process, Path]], zygote: Zygote, stage: str) -> float:
    """Seconds that an undisturbed process goes on after it has reached a stage for the first time."""
    process, stages = start()
    wait_for(zygote, process, stages, stage, 0, 0.0)
    began = time.monotonic()
    assert zygote.wait(process) == 0, process.said()
    return time.monotonic() - began


def _record(ledger: Ledger, draw: int, role: str, *, fired: bool, lost: int, wrong: int) -> None:
    ledger.record(
        call="time",
        ordinal=draw,
        file="",
        phase=f"{role}-random",
        role=role,
        fired=fired,
        lost=lost,
        wrong=wrong,
        kill=True,
    )


def _nothing() -> None:
    """No rerun: the job itself went on to its end."""
