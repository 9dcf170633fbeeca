"""Fault injection into distill: a rerun must equal an undisturbed run and repeat no completed checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from faults.fault_log import FaultLog
from faults.kills.cluster import FaultCluster, copy_tree
from faults.kills.durability import DurabilityModel
from faults.kills.fork_server import Process
from faults.kills.inject import InjectionResult, ending_complaints
from faults.kills.injection_points import InjectionPoint, phase_of
from faults.kills.strace import KILL, Injection, Tracer
from faults.kills.trace import Trace, read_trace
from faults.recovery import living_processes
from safetensors.torch import load_file

_CLOCKS = ("images_per_second", "data_wait_share", "seconds", "finished", "run", "crc32")
"""Fields of a line that depend on time, and the line's checksum."""

_SESSIONS = re.compile(r"events\.out\.tfevents\..*")


@dataclass(frozen=True)
class RunContents:
    """Contents of a finished run: lines of metrics without times, weights, names of files."""

    lines: list[dict[str, Any]]
    weights: dict[str, bytes]
    files: frozenset[str]

    @classmethod
    def of(cls, run: Path) -> RunContents:
        """Read a run."""
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        tensors = {
            f"{name}/{key}": value.numpy().tobytes()
            for name in ("student.safetensors", "mean_embedding.safetensors")
            for key, value in load_file(run / name).items()
        }
        return cls([_without_clocks(line) for line in lines], tensors, files_of(run))


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training on `store`, started on a copy of the run `template`; None starts without a run.

    `checkpoints` counts those that an undisturbed run saves from there. With a `mutation` the trainer lacks a
    safeguard, which the rerun has.
    """

    name: str
    mutation: str | None = None
    cluster: FaultCluster
    store: Path
    template: Path | None
    undisturbed: RunContents
    checkpoints: int

    def prepared(self) -> Path:
        """Set up the start state in a new folder and return the run's path."""
        return _prepared(self.cluster, self.template)

    def start(self, run: Path, tracer: Callable[[int], object] | None = None) -> Process:
        """Start the command; its stages go to the file `stages` beside the run."""
        return self.cluster.start_distill(
            self.store, run, run.with_name("stages"), tracer, mutation=self.mutation
        )

    def rerun(self, run: Path) -> int:
        """Run the same command to its end, assert that it succeeds, and return how many checkpoints it saved."""
        return _train(self.cluster, self.store, run)


def trainings(cluster: FaultCluster, store: Path) -> dict[str, Callable[[], Training]]:
    """Return {name: function that makes the training}."""
    return {"new": lambda: _new(cluster, store), "resume": lambda: _resume(cluster, store)}


def _new(cluster: FaultCluster, store: Path) -> Training:
    run = _prepared(cluster, None)
    checkpoints = _train(cluster, store, run)
    return Training(
        name="new",
        cluster=cluster,
        store=store,
        template=None,
        undisturbed=RunContents.of(run),
        checkpoints=checkpoints,
    )


def _resume(cluster: FaultCluster, store: Path) -> Training:
    """Resume after a trainer was killed in its second epoch, after a line of metrics that no checkpoint covers."""
    new = _new(cluster, store)
    trace, _ = trace_trainer(new)
    saves = [event for event in trace.events if event.stage == "checkpoint" and event.call == "openat"]
    late = saves[2 * len(saves) // 3]
    run = new.prepared()
    tracer = Tracer(run.with_name("log"), InjectionPoint.at(late).injection)
    assert cluster.fork_server.wait(new.start(run, tracer)) == -9
    tracer.end()
    made = _completed_checkpoints(run.with_name("stages"))
    return Training(
        name="resume",
        cluster=cluster,
        store=store,
        template=run,
        undisturbed=new.undisturbed,
        checkpoints=new.checkpoints - made,
    )


def trace_trainer(training: Training) -> tuple[Trace, Path]:
    """Return the trace of an undisturbed trainer, and its run."""
    run = training.prepared()
    tracer = Tracer(run.with_name("log"))
    process = training.start(run, tracer)
    assert training.cluster.fork_server.wait(process) == 0, process.printed()
    tracer.end()
    return read_trace(tracer.log, run.with_name("stages")), run


def inject_into_trainer(training: Training, point: InjectionPoint, fault_log: FaultLog) -> InjectionResult:
    """Kill a trainer, or fail one of its calls, and run again.

    After a kill at a checkpoint, also run again on what a power cut at that moment would have left.
    """
    run = training.prepared()
    before = [*run.parent.rglob("*")]
    tracer = Tracer(run.with_name("log"), point.injection)
    process = training.start(run, tracer)
    code = training.cluster.fork_server.wait(process)
    tracer.end()
    trace = read_trace(tracer.log, run.with_name("stages"))
    hit = trace.hit(point.injection)
    complaints = [] if hit is None else ending_complaints(point, code, process.printed())
    if hit is not None:
        point = replace(point, phase=phase_of(hit, run, "trainer"))
        if point.injection.effect == KILL and hit.stage == "checkpoint":
            complaints += _cut_power(
                training, run, process, DurabilityModel(run, before).run(trace.events), point, fault_log
            )
    return recover_training(training, run, process, point, hit is not None, complaints, fault_log)


def _cut_power(
    training: Training,
    run: Path,
    process: Process,
    model: DurabilityModel,
    point: InjectionPoint,
    fault_log: FaultLog,
) -> list[str]:
    # At the same path, since the draft of the link `latest` is named after it.
    place, aside = run.parent, training.cluster.new_folder() / "aside"
    place.rename(aside)
    copy_tree(aside, place)
    model.cut(place, place)
    cut = replace(point, injection=Injection("power-cut", point.injection.ordinal))
    result = recover_training(training, run, process, cut, True, [], fault_log, kill=False)
    aside.rename(place)
    return result.complaints


def recover_training(
    training: Training,
    run: Path,
    process: Process,
    point: InjectionPoint,
    fired: bool,
    complaints: list[str],
    fault_log: FaultLog,
    *,
    kill: bool = True,
) -> InjectionResult:
    """Run again, compare with the undisturbed run, log the fault and delete the folder."""
    made = _completed_checkpoints(run.with_name("stages"))
    # A trainer that was hit after its last checkpoint repeats none.
    again = training.rerun(run) - (training.checkpoints - made)
    outcome = RunContents.of(run)
    same = outcome.lines == training.undisturbed.lines and outcome.weights == training.undisturbed.weights
    fault_log.record(
        call=point.injection.name,
        ordinal=point.injection.ordinal,
        file=point.phase.rpartition("-")[2],
        phase=point.phase,
        role="trainer",
        fired=fired,
        lost=max(0, again),
        wrong=0 if same else 1,
        kill=kill and point.injection.effect == KILL,
    )
    complaints = [
        *complaints,
        *([f"{again} checkpoints' work was repeated"] if again > 0 else []),
        *([] if same else [f"other numbers: {first_difference(outcome.lines, training.undisturbed.lines)}"]),
        *[f"left behind: {name}" for name in sorted(outcome.files - training.undisturbed.files)],
        *[f"process {pid} still runs" for pid in living_processes([process.session])],
    ]
    shutil.rmtree(run.parent)
    return InjectionResult(fired, [f"{point}: {line}" for line in complaints])


def first_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """Describe the first line in which two runs differ."""
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            return f"{one} instead of {other}"
    return f"{len(ours)} lines instead of {len(theirs)}" if len(ours) != len(theirs) else "the weights"


def files_of(run: Path) -> frozenset[str]:
    """Return names in the run's folder and beside it in runs/; TensorBoard's files, one a session, count as one."""
    beside = [path for path in (run.parent / "runs").iterdir() if path.name != "latest"]
    return frozenset(
        [_SESSIONS.sub("events", path.name) for path in run.iterdir()] + [path.name for path in beside]
    )


def _without_clocks(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in _CLOCKS}


def _prepared(cluster: FaultCluster, template: Path | None) -> Path:
    run = cluster.new_folder() / "run"
    if template is not None:
        copy_tree(template, run)
    return run


def _train(cluster: FaultCluster, store: Path, run: Path) -> int:
    stages = run.with_name(f"stages-{cluster.new_folder().name}")
    process = cluster.start_distill(store, run, stages)
    code = cluster.fork_server.wait(process)
    assert code == 0, f"distill ended with {code}:\n{process.printed()}"
    return _completed_checkpoints(stages)


def _completed_checkpoints(stages: Path) -> int:
    """Return how many checkpoints a process completed; 0 if it was hit before it wrote a stage."""
    return stages.read_text().splitlines().count("-checkpoint") if stages.exists() else 0
