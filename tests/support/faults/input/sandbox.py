"""Sandbox for hostile files: they are read in a subprocess with bounded memory and time."""

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
EXTRA_BYTES = 3 << 30
"""Bytes of address space beyond those at the process's start: far less than the hostile files ask for."""

_forkserver = get_context("forkserver")


def _start_server() -> None:
    """Start a fork server that has imported this module; without PYTHONPATH it would silently not find it."""
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
    """Result of reading one file."""

    outcome: str
    """One of "read", "refused" (by one of the package's errors) or "crash"."""
    message: str
    """Text of the error."""
    grown: int
    """Growth of the process's peak resident memory, bytes."""


def read_in_sandbox(reader: str, paths: Sequence[Path]) -> list[ReadResult]:
    """Read files with one of READERS, all in one subprocess.

    If a file ends the subprocess, that file and those after it are reported as "crash".
    """
    _start_server()
    ours, theirs = _forkserver.Pipe(duplex=False)
    process = _forkserver.Process(target=_read_files, args=(theirs, reader, paths))
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


def _read_files(connection: Connection, reader: str, paths: Sequence[Path]) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, used + EXTRA_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    torch.set_num_threads(1)
    for path in paths:
        before = _peak()
        try:
            READERS[reader](path)
            outcome, message = "read", ""
        except (SamError, DistillError) as error:
            outcome, message = "refused", str(error)
        except BaseException as error:  # noqa: BLE001 - reported to the caller
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
    """Load the file as a run's last.pt, without a previous.pt."""
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
