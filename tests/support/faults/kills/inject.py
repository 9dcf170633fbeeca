"""Fault injection into precompute: hit a process, read what is left, run again, compare, log."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from faults.fault_log import FaultLog
from faults.kills.durability import DurabilityModel
from faults.kills.fork_server import Process
from faults.kills.injection_points import InjectionPoint, phase_of
from faults.kills.scenarios import Scenario
from faults.kills.strace import KILL, Tracer
from faults.kills.trace import Event, Trace, kind_of, read_trace
from faults.recovery import missing_rows, rerun_and_compare, wrong_reads

from mobilesam.store import EmbeddingStore

INPUT_ERROR = 3
"""Exit code for errors of input and environment."""


@dataclass(frozen=True)
class InjectionResult:
    """Result of one injected fault; no complaints if everything was restored."""

    fired: bool
    complaints: list[str]


def trace_coordinator(scenario: Scenario) -> tuple[Trace, Path]:
    """Return the trace of an undisturbed coordinator, and its store."""
    store = scenario.prepared()
    scenario.cluster.ensure_worker()
    tracer = Tracer(store.with_name("log"))
    process = scenario.start(store, tracer)
    assert scenario.cluster.fork_server.wait(process) == 0, process.printed()
    tracer.end()
    return read_trace(tracer.log, store.with_name("stages")), store


def inject_into_coordinator(
    scenario: Scenario, point: InjectionPoint, fault_log: FaultLog
) -> InjectionResult:
    """Kill a scenario's command, or fail one of its calls, while the worker keeps running."""
    store = scenario.prepared()
    before = [*store.parent.rglob("*")]
    scenario.cluster.ensure_worker()
    tracer = Tracer(store.with_name("log"), point.injection)
    process = scenario.start(store, tracer)
    code = scenario.cluster.fork_server.wait(process)
    tracer.end()
    trace = read_trace(tracer.log, store.with_name("stages"))
    hit = trace.hit(point.injection)
    complaints = [] if hit is None else ending_complaints(point, code, process.printed())
    if hit is not None and point.injection.effect == KILL:
        complaints += _cut_power(
            scenario, store, DurabilityModel(store, before).run(trace.events), fault_log, point
        )
    return _recover(scenario, store, point, hit, [process], complaints, fault_log, scenario.role)


def trace_worker(scenario: Scenario) -> tuple[Trace, Path]:
    """Return the trace of an undisturbed worker, and the store that it wrote to."""
    store, tracer, stages, _ = _with_worker(scenario, None)
    return read_trace(tracer.log, stages), store


def inject_into_worker(scenario: Scenario, point: InjectionPoint, fault_log: FaultLog) -> InjectionResult:
    """Kill a worker, or fail one of its calls, while the coordinator runs; a killed worker is replaced.

    A kill must not end the job.
    """
    store, tracer, stages, coordinator = _with_worker(scenario, point)
    hit = read_trace(tracer.log, stages).hit(point.injection)
    complaints = []
    if point.injection.effect == KILL and coordinator.code != 0:
        complaints = [f"the job ended with {coordinator.code}: {coordinator.printed()[-500:]}"]
    elif hit is not None:
        complaints = ending_complaints(point, coordinator.code, coordinator.printed(), role="worker")
    return _recover(scenario, store, point, hit, [coordinator], complaints, fault_log, "worker")


def _with_worker(scenario: Scenario, point: InjectionPoint | None) -> tuple[Path, Tracer, Path, Process]:
    """Run a job on a traced worker that is hit at `point`."""
    cluster, store = scenario.cluster, scenario.prepared()
    stages = store.with_name("worker-stages")
    tracer = Tracer(store.with_name("log"), None if point is None else point.injection)
    worker = cluster.start_worker(stages, tracer)
    coordinator = scenario.start(store)
    while cluster.fork_server.running(coordinator) and cluster.fork_server.running(worker):
        time.sleep(0.005)
    # Rows that the manifest lists are read while the job runs.
    wrong = wrong_reads(store, scenario.undisturbed) if cluster.fork_server.running(coordinator) else []
    assert not wrong, f"read wrongly while the job ran: {wrong}"
    cluster.ensure_worker()
    cluster.fork_server.wait(coordinator)
    cluster.kill_worker()
    tracer.end()
    return store, tracer, stages, coordinator


def _recover(
    scenario: Scenario,
    store: Path,
    point: InjectionPoint,
    hit: Event | None,
    processes: list[Process],
    complaints: list[str],
    fault_log: FaultLog,
    role: str,
) -> InjectionResult:
    """Run again, compare, log the fault and delete the folder."""
    outcome = rerun_and_compare(
        store,
        scenario.undisturbed,
        lambda: scenario.rerun(store),
        promised=promised_keys(store.with_name("stages"), store),
        sessions=[process.session for process in processes],
    )
    fault_log.record(
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
    return InjectionResult(hit is not None, [f"{point}: {line}" for line in complaints])


def promised_keys(stages: Path, store: Path) -> list[str]:
    """Return the keys of images in shards whose commit had returned, without failed images."""
    lines = stages.read_text().splitlines() if stages.exists() else []
    shards = {int(line.split()[1]) for line in lines if line.startswith("-commit ")}
    if not shards:
        return []
    with EmbeddingStore.open(store) as opened:
        size = opened.spec.shard_size
        return [
            record.key
            for record in opened.manifest.records(None)
            if record.row // size in shards and record.status != "failed"
        ]


def _cut_power(
    scenario: Scenario, store: Path, model: DurabilityModel, fault_log: FaultLog, point: InjectionPoint
) -> list[str]:
    """Apply a power cut to a copy at the same moment: no promised row may be lost, none wrong."""
    copy = scenario.cluster.new_folder() / "after"
    # Before the store is opened, which would roll a killed transaction back.
    shutil.copytree(store.parent, copy)
    model.cut(store.parent, copy)
    promised = promised_keys(store.with_name("stages"), store)
    left = copy / store.name
    missing = set(promised) & set(missing_rows(left, scenario.undisturbed))
    wrong = wrong_reads(left, scenario.undisturbed)
    fault_log.record(
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


def ending_complaints(point: InjectionPoint, code: int, output: str, role: str = "") -> list[str]:
    """Return complaints about how a command ended.

    A killed one must end by SIGKILL; one whose call failed must succeed or print an error with its remedy.
    """
    if point.injection.effect == KILL:
        return [] if code == -9 or role == "worker" else [f"it ended with {code} instead of by SIGKILL"]
    if code not in (0, INPUT_ERROR):
        return [f"it ended with {code}: {output[-500:]}"]
    if code == INPUT_ERROR and not re.search(r"^error: .{20,}", output, re.MULTILINE):
        return [f"it did not say what went wrong: {output[-500:]}"]
    if "Traceback" in output or "This is a bug" in output:
        return [f"it did not expect this: {output[-800:]}"]
    return []
