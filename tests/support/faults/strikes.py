"""One fault each: hit a process, look at what is left, run again, compare, and write it down."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from faults.durability import Model
from faults.events import Event, Trace, kind_of, read_trace
from faults.ledger import Ledger
from faults.points import Point, phase_of
from faults.recovery import missing_rows, recovered, wrong_reads
from faults.scenarios import Scenario
from faults.tracing import KILL, Tracer
from faults.zygote import Process

from mobilesam.store import EmbeddingStore

INPUT = 3
"""The exit code for what is wrong with the surroundings."""


@dataclass(frozen=True)
class Struck:
    """What a strike came to: complaints, none when all is well."""

    fired: bool
    complaints: list[str]


def trace_coordinator(scenario: Scenario) -> tuple[Trace, Path]:
    """An undisturbed coordinator's system calls, and its store."""
    store = scenario.prepared()
    scenario.scene.ensure_worker()
    tracer = Tracer(store.with_name("log"))
    process = scenario.start(store, tracer)
    assert scenario.scene.zygote.wait(process) == 0, process.said()
    tracer.end()
    return read_trace(tracer.log, store.with_name("stages")), store


def strike_coordinator(scenario: Scenario, point: Point, ledger: Ledger) -> Struck:
    """Kill a scenario's command, or let a call of it fail; the worker lives on."""
    store = scenario.prepared()
    before = [*store.parent.rglob("*")]
    scenario.scene.ensure_worker()
    tracer = Tracer(store.with_name("log"), point.injection)
    process = scenario.start(store, tracer)
    code = scenario.scene.zygote.wait(process)
    tracer.end()
    trace = read_trace(tracer.log, store.with_name("stages"))
    hit = trace.hit(point.injection)
    complaints = [] if hit is None else ending(point, code, process.said())
    if hit is not None and point.injection.effect == KILL:
        complaints += _cut_power(scenario, store, Model(store, before).run(trace.events), ledger, point)
    return _recover(scenario, store, point, hit, [process], complaints, ledger, scenario.role)


def trace_worker(scenario: Scenario) -> tuple[Trace, Path]:
    """An undisturbed worker's system calls, and the store that it worked on."""
    store, tracer, stages, _ = _with_worker(scenario, None)
    return read_trace(tracer.log, stages), store


def strike_worker(scenario: Scenario, point: Point, ledger: Ledger) -> Struck:
    """Kill a worker, or let a call of it fail, while the coordinator lives; a dead one is replaced.

    A kill must not end the job.
    """
    store, tracer, stages, coordinator = _with_worker(scenario, point)
    hit = read_trace(tracer.log, stages).hit(point.injection)
    complaints = []
    if point.injection.effect == KILL and coordinator.code != 0:
        complaints = [f"the job ended with {coordinator.code}: {coordinator.said()[-500:]}"]
    elif hit is not None:
        complaints = ending(point, coordinator.code, coordinator.said(), role="worker")
    return _recover(scenario, store, point, hit, [coordinator], complaints, ledger, "worker")


def _with_worker(scenario: Scenario, point: Point | None) -> tuple[Path, Tracer, Path, Process]:
    """Run a job on a worker that is traced, and hit at `point`."""
    scene, store = scenario.scene, scenario.prepared()
    stages = store.with_name("worker-stages")
    tracer = Tracer(store.with_name("log"), None if point is None else point.injection)
    worker = scene.start_worker(stages, tracer)
    coordinator = scenario.start(store)
    while scene.zygote.running(coordinator) and scene.zygote.running(worker):
        time.sleep(0.005)
    # Whatever the manifest lists by now is read while the job goes on.
    wrong = wrong_reads(store, scenario.undisturbed) if scene.zygote.running(coordinator) else []
    assert not wrong, f"read wrongly while the job went on: {wrong}"
    scene.ensure_worker()
    scene.zygote.wait(coordinator)
    scene.kill_worker()
    tracer.end()
    return store, tracer, stages, coordinator


def _recover(
    scenario: Scenario,
    store: Path,
    point: Point,
    hit: Event | None,
    processes: list[Process],
    complaints: list[str],
    ledger: Ledger,
    role: str,
) -> Struck:
    """Run again, compare, write it down and clear away."""
    outcome = recovered(
        store,
        scenario.undisturbed,
        lambda: scenario.rerun(store),
        promised=promised_keys(store.with_name("stages"), store),
        sessions=[process.session for process in processes],
    )
    ledger.record(
        call=point.injection.name,
        ordinal=point.injection.ordinal,
        file=kind_of(hit.path, store) or hit.path if hit else "",
        phase=phase_of(hit, store, role) if hit else point.phase,
        role=role,
        fired=hit is not None,
        lost=len(outcome.missing),
        wrong=len(outcome.wrong),
        kill=point.injection.effect == KILL,
    )
    complaints = complaints + [f"{what}: {found}" for what, found in vars(outcome).items() if found]
    shutil.rmtree(store.parent)
    return Struck(hit is not None, [f"{point}: {line}" for line in complaints])


def promised_keys(stages: Path, store: Path) -> list[str]:
    """Keys of the images in shards whose commit had returned, those that failed left out."""
    said = stages.read_text().splitlines() if stages.exists() else []
    shards = {int(line.split()[1]) for line in said if line.startswith("-commit ")}
    if not shards:
        return []
    with EmbeddingStore.open(store) as opened:
        size = opened.spec.shard_size
        return [
            record.key
            for record in opened.manifest.records(None)
            if record.row // size in shards and record.status != "failed"
        ]


def _cut_power(scenario: Scenario, store: Path, model: Model, ledger: Ledger, point: Point) -> list[str]:
    """The same moment with the power gone too: nothing that was promised may be unreadable, nothing wrong."""
    copy = scenario.scene.place() / "after"
    # Before anybody opens the store: that would roll a killed transaction back.
    shutil.copytree(store.parent, copy)
    model.cut(store.parent, copy)
    promised = promised_keys(store.with_name("stages"), store)
    left = copy / store.name
    missing = set(promised) & set(missing_rows(left, scenario.undisturbed))
    wrong = wrong_reads(left, scenario.undisturbed)
    ledger.record(
        call="power-cut",
        ordinal=point.injection.ordinal,
        file="",
        phase=point.phase,
        role=scenario.role,
        fired=True,
        lost=len(missing),
        wrong=len(wrong),
    )
    shutil.rmtree(copy.parent)
    return [f"after a power cut: missing {sorted(missing)}, wrong {wrong}"] if missing or wrong else []


def ending(point: Point, code: int, said: str, role: str = "") -> list[str]:
    """A process that was killed is gone; a command that met an error says so and how to mend it, or got over it."""
    if point.injection.effect == KILL:
        return [] if code == -9 or role == "worker" else [f"it ended with {code} instead of by SIGKILL"]
    if code not in (0, INPUT):
        return [f"it ended with {code}: {said[-500:]}"]
    if code == INPUT and not re.search(r"^error: .{20,}", said, re.MULTILINE):
        return [f"it did not say what went wrong: {said[-500:]}"]
    if "Traceback" in said or "This is a bug" in said:
        return [f"it did not expect this: {said[-800:]}"]
    return []
