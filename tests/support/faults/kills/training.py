"""Faults in training: what a killed trainer's rerun must come to, and how much of the work it may do again."""

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
from faults.kills.inject import InjectionResult, ending
from faults.kills.injection_points import InjectionPoint, phase_of
from faults.kills.strace import KILL, Injection, Tracer
from faults.kills.trace import Trace, read_trace
from faults.recovery import living_processes
from safetensors.torch import load_file

_CLOCKS = ("images_per_second", "data_wait_share", "seconds", "run", "crc32")
"""What a line says about time, with the checksum over it."""

_SESSIONS = re.compile(r"events\.out\.tfevents\..*")


@dataclass(frozen=True)
class RunContents:
    """A finished run: its lines of metrics without clocks, its weights, and the names of its files."""

    lines: list[dict[str, Any]]
    weights: dict[str, bytes]
    files: frozenset[str]

    @classmethod
    def of(cls, run: Path) -> RunContents:
        """Read it."""
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        tensors = {
            f"{name}/{key}": value.numpy().tobytes()
            for name in ("student.safetensors", "mean_embedding.safetensors")
            for key, value in load_file(run / name).items()
        }
        return cls([_without_clocks(line) for line in lines], tensors, files_of(run))


@dataclass(frozen=True, kw_only=True)
class Training:
    """`mobilesam distill` on `store`, begun on a copy of `template` (None: on nothing). `checkpoints` are what an
    undisturbed run makes from there. With a `mutation` the trainer lacks one of its safeguards; the rerun has it."""

    name: str
    mutation: str | None = None
    cluster: FaultCluster
    store: Path
    template: Path | None
    undisturbed: RunContents
    checkpoints: int

    def prepared(self) -> Path:
        """The run's folder in a new folder, with what is there before."""
        return _prepared(self.cluster, self.template)

    def start(self, run: Path, tracer: Callable[[int], object] | None = None) -> Process:
        """The command, its stages in a new file `stages`."""
        return self.cluster.start_distill(
            self.store, run, run.with_name("stages"), tracer, mutation=self.mutation
        )

    def rerun(self, run: Path) -> int:
        """The same command to its end: how many checkpoints it made. AssertionError unless it goes well."""
        return _train(self.cluster, self.store, run)


def trainings(cluster: FaultCluster, store: Path) -> dict[str, Callable[[], Training]]:
    """By name; each is made when it is asked for."""
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
    """A trainer was killed in its second epoch, after a line that no checkpoint knows of."""
    new = _new(cluster, store)
    trace, _ = trace_trainer(new)
    saves = [event for event in trace.events if event.stage == "checkpoint" and event.call == "openat"]
    late = saves[2 * len(saves) // 3]
    run = new.prepared()
    tracer = Tracer(run.with_name("log"), InjectionPoint.at(late).injection)
    assert cluster.fork_server.wait(new.start(run, tracer)) == -9
    tracer.end()
    made = _made(run.with_name("stages"))
    return Training(
        name="resume",
        cluster=cluster,
        store=store,
        template=run,
        undisturbed=new.undisturbed,
        checkpoints=new.checkpoints - made,
    )


def trace_trainer(training: Training) -> tuple[Trace, Path]:
    """An undisturbed trainer's system calls, and its run."""
    run = training.prepared()
    tracer = Tracer(run.with_name("log"))
    process = training.start(run, tracer)
    assert training.cluster.fork_server.wait(process) == 0, process.printed()
    tracer.end()
    return read_trace(tracer.log, run.with_name("stages")), run


def inject_into_trainer(training: Training, point: InjectionPoint, fault_log: FaultLog) -> InjectionResult:
    """Kill a trainer, or let a call of it fail, and run again; where it was killed at a checkpoint, also on what a
    power cut at that moment would have left."""
    run = training.prepared()
    before = [*run.parent.rglob("*")]
    tracer = Tracer(run.with_name("log"), point.injection)
    process = training.start(run, tracer)
    code = training.cluster.fork_server.wait(process)
    tracer.end()
    trace = read_trace(tracer.log, run.with_name("stages"))
    hit = trace.hit(point.injection)
    complaints = [] if hit is None else ending(point, code, process.printed())
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
    # At its own place, since the name of the link's draft is made from that.
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
    """Run again, compare with the undisturbed run, write it down and clear away."""
    made = _made(run.with_name("stages"))
    # Whoever was hit after the last checkpoint has nothing to do again but to report.
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
        *([f"{again} checkpoints' work was done again"] if again > 0 else []),
        *([] if same else [f"other numbers: {first_difference(outcome.lines, training.undisturbed.lines)}"]),
        *[f"left behind: {name}" for name in sorted(outcome.files - training.undisturbed.files)],
        *[f"process {pid} lives on" for pid in living_processes([process.session])],
    ]
    shutil.rmtree(run.parent)
    return InjectionResult(fired, [f"{point}: {line}" for line in complaints])


def first_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """The first line in which two runs differ."""
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            return f"{one} instead of {other}"
    return f"{len(ours)} lines instead of {len(theirs)}" if len(ours) != len(theirs) else "the weights"


def files_of(run: Path) -> frozenset[str]:
    """Names in the run's folder and beside it in runs/; TensorBoard's files, one a session, count as one."""
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
    return _made(stages)


def _made(stages: Path) -> int:
    """How many checkpoints a process has completed; a file that isn't there is one of a process hit early."""
    return stages.read_text().splitlines().count("-checkpoint") if stages.exists() else 0
