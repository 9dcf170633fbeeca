"""kill -9 at random times after the first commit or checkpoint."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from faults.fault_log import FaultLog
from faults.kills.fork_server import GUARD_SECONDS, ForkServer, Process
from faults.kills.inject import InjectionResult, promised_keys
from faults.kills.injection_points import InjectionPoint
from faults.kills.scenarios import Scenario
from faults.kills.strace import Injection
from faults.kills.training import Training, recover_training
from faults.recovery import rerun_and_compare, wrong_reads


def random_point(draw: int, role: str) -> InjectionPoint:
    """Return the point of the fault log for a random kill."""
    return InjectionPoint(Injection("time", draw), f"{role}-random")


def wait_for(
    fork_server: ForkServer, process: Process, stages: Path, stage: str, draw: int, within: float
) -> None:
    """Wait until a stage was reached once, then for a random part of `within` seconds with the seed `draw`.

    The part is two thirds at most, since processes that end earlier do not count.
    """
    deadline = time.monotonic() + GUARD_SECONDS
    while fork_server.running(process) and not (stages.exists() and stage in stages.read_text()):
        assert time.monotonic() < deadline, process.printed()
        time.sleep(0.002)
    time.sleep(random.Random(draw).uniform(0, within * 2 / 3))


def kill_coordinator_at_random(
    scenario: Scenario, draw: int, seconds: float, fault_log: FaultLog, *, both: bool = False
) -> InjectionResult:
    """Kill the coordinator, and its worker if `both`, within the `seconds` that it runs after its first commit."""
    cluster, store, point = scenario.cluster, scenario.prepared(), random_point(draw, "coordinator")
    cluster.ensure_worker()
    process = scenario.start(store)
    wait_for(cluster.fork_server, process, store.with_name("stages"), "-commit", draw, seconds)
    if both:
        cluster.kill_worker()
    cluster.fork_server.kill(process)
    code = cluster.fork_server.wait(process)
    outcome = rerun_and_compare(
        store,
        scenario.undisturbed,
        lambda: scenario.rerun(store),
        promised=promised_keys(store.with_name("stages"), store),
        sessions=[process.session],
    )
    role = "coordinator and worker" if both else "coordinator"
    _record(fault_log, draw, role, fired=code == -9, lost=len(outcome.missing), wrong=len(outcome.wrong))
    return InjectionResult(
        code == -9, [f"{point}: {what} {found}" for what, found in vars(outcome).items() if found]
    )


def kill_worker_at_random(
    scenario: Scenario, draw: int, seconds: float, fault_log: FaultLog
) -> InjectionResult:
    """Kill the worker and start another; the job must continue."""
    cluster, store, point = scenario.cluster, scenario.prepared(), random_point(draw, "worker")
    cluster.start_worker()
    process = scenario.start(store)
    wait_for(cluster.fork_server, process, store.with_name("stages"), "-commit", draw, seconds)
    fired = cluster.fork_server.running(process)
    cluster.kill_worker()
    wrong = wrong_reads(store, scenario.undisturbed)
    cluster.ensure_worker()
    code = cluster.fork_server.wait(process)
    outcome = rerun_and_compare(store, scenario.undisturbed, _nothing, sessions=[process.session])
    _record(
        fault_log,
        draw,
        "worker",
        fired=fired,
        lost=len(outcome.missing),
        wrong=len(outcome.wrong) + len(wrong),
    )
    complaints = [f"{what} {found}" for what, found in vars(outcome).items() if found]
    complaints += [] if code == 0 else [f"the job ended with {code}: {process.printed()[-500:]}"]
    return InjectionResult(fired, [f"{point}: {line}" for line in complaints])


def kill_trainer_at_random(
    training: Training, draw: int, seconds: float, fault_log: FaultLog
) -> InjectionResult:
    """Kill the trainer at a random time after its first checkpoint."""
    run, fork_server = training.prepared(), training.cluster.fork_server
    process = training.start(run)
    wait_for(fork_server, process, run.with_name("stages"), "-checkpoint", draw, seconds)
    fork_server.kill(process)
    fired = fork_server.wait(process) == -9
    return recover_training(training, run, process, random_point(draw, "trainer"), fired, [], fault_log)


def seconds_after(start: Callable[[], tuple[Process, Path]], fork_server: ForkServer, stage: str) -> float:
    """Measure for how many seconds an undisturbed process runs after it first reached a stage."""
    process, stages = start()
    wait_for(fork_server, process, stages, stage, 0, 0.0)
    began = time.monotonic()
    assert fork_server.wait(process) == 0, process.printed()
    return time.monotonic() - began


def _record(fault_log: FaultLog, draw: int, role: str, *, fired: bool, lost: int, wrong: int) -> None:
    fault_log.record(
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
    """Do nothing instead of a rerun: the job itself ran to its end."""
