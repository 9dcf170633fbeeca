"""Hostile files are read in a process of their own, with bounded memory and time, and what became of it is told."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from mobilesam.common.errors import DistillError, SamError
from mobilesam.distill import build_student, load_student
from mobilesam.distill.checkpoint import Checkpoints, EmbeddingSum, TrainState
from mobilesam.distill.optimizer import parameter_groups
from mobilesam.sam.teacher import load_head, load_teacher

CPU_SECONDS = 120
ROOM = 3 << 30
"""Bytes of address space beyond what the process has at its start: far less than what the files here ask for."""

_forkserver = get_context("forkserver")


def _start_server() -> None:
    """A process that has imported this module, to be forked; by itself it would not find it (and not say so)."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        _forkserver.set_forkserver_preload([__name__])
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@dataclass(frozen=True)
class ReadResult:
    """`outcome` is "read", "refused" (by one of our errors) or "crash"; `grown` the bytes by which the process's
    resident memory grew at most."""

    outcome: str
    message: str
    grown: int


def read_in_sandbox(reader: str, paths: Sequence[Path]) -> list[ReadResult]:
    """Read files with one of READERS, all in one process; a file that ends it is the last result but for those
    that were not reached."""
    _start_server()
    ours, theirs = _forkserver.Pipe(duplex=False)
    process = _forkserver.Process(target=_examine, args=(theirs, reader, paths))
    process.start()
    theirs.close()
    results: list[ReadResult] = []
    try:
        for _ in paths:
            results.append(ours.recv())
    except EOFError:
        process.join()
        rest = ReadResult("crash", f"the process ended with {process.exitcode}", 0)
        results += [rest] * (len(paths) - len(results))
    process.join()
    return results


def _examine(connection: Connection, reader: str, paths: Sequence[Path]) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    torch.set_num_threads(1)
    for path in paths:
        before = _peak()
        try:
            READERS[reader](path)
            outcome, message = "read", ""
        except (SamError, DistillError) as error:
            outcome, message = "refused", str(error)
        except BaseException as error:  # noqa: BLE001 - told on the other side
            outcome, message = "crash", repr(error)[:500]
        connection.send(ReadResult(outcome, message, _peak() - before))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _teacher(path: Path) -> None:
    load_teacher("mobile_sam", path, image_size=64)


def _head(path: Path) -> None:
    load_head("mobile_sam", path)


def _student(path: Path) -> None:
    load_student(path)


def _checkpoint(path: Path) -> None:
    """As a run's last.pt, with nothing before it."""
    (path.parent / "last.pt").unlink(missing_ok=True)
    os.link(path, path.parent / "last.pt")
    student = build_student("tiny_vit", 64, 0)
    optimizer = torch.optim.AdamW(parameter_groups(student, 0.1))
    state = TrainState(embeddings=EmbeddingSum(sum_CHW=torch.zeros(256, 4, 4, dtype=torch.float64)))
    Checkpoints(folder=path.parent, run_id="mine").load(student, optimizer, state, torch.device("cpu"))


READERS: Mapping[str, Callable[[Path], None]] = {
    "teacher": _teacher,
    "head": _head,
    "student": _student,
    "checkpoint": _checkpoint,
}
