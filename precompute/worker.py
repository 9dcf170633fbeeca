"""What a dask worker is: the holder of one teacher.

A worker runs two shard tasks at a time (`shard.py`). The teacher serves one shard at a time, so that one shard is
decoded and another written while it computes a third's batches.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from distributed import Worker, WorkerPlugin, get_worker
from distributed.threadpoolexecutor import ThreadPoolExecutor

from .. import __version__
from ..common.errors import PrecomputeError
from ..sam.allocator import keep_freed_memory
from .messages import MESSAGE_TOPIC, TeacherSetup

if TYPE_CHECKING:
    from ..sam.teacher import Teacher

P = ParamSpec("P")
T = TypeVar("T")

TASKS_PER_WORKER = 2
"""Shard tasks that a worker runs at a time: one under the teacher, one decoding or writing."""


class TeacherPlugin(WorkerPlugin):
    """Holds a worker's teacher, loaded at its first task, so that what is wrong with it reaches the coordinator."""

    def __init__(self, run: str, setup: TeacherSetup) -> None:
        self.name = f"mobilesam-{run}"
        self.run = run
        self._setup = setup

    def setup(self, worker: Worker) -> None:
        """Prepare the worker; called by dask on its main thread."""
        self._lock = threading.Lock()
        self._teacher: Teacher | None = None
        self._worker = worker
        if self._setup.local and worker.nanny:
            die_with_parent()
        self.threads = self._setup.threads or worker.state.nthreads
        # A worker of a local cluster is called 0, 1, ...: each takes its own device.
        place = worker.name if isinstance(worker.name, int) else 0
        self._device = self._setup.devices[place % len(self._setup.devices)]
        if self._device == "cpu":
            keep_freed_memory()  # while the threads that run tasks are still to come
        # Of daemons, as dask's own are: a teacher that hangs keeps no process from ending.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")

    def teardown(self, worker: Worker) -> None:
        """Let the teacher's thread go; called by dask."""
        self._thread.shutdown(wait=False)

    def compute(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in the one thread in which everything of the teacher is computed.

        A thread that uses OpenMP has a team of threads of its own for it. Two teams are more threads than cores, and
        all of them would then sleep at each barrier instead of waiting awake: a tenth of the teacher's time on a CPU.
        """
        result: T = self._thread.submit(function, *args, **kwargs).result()
        return result

    @contextmanager
    def teacher(self) -> Iterator[Teacher]:
        """The worker's teacher, for one thread at a time."""
        with self._lock:
            if self._teacher is None:
                self._teacher = self._ready()
            yield self._teacher

    def _ready(self) -> Teacher:
        from .sizing import compile_timeout

        teacher = self.compute(_load, self._setup, self._device, self.threads)
        if batch_size := self._setup.compiled_batch:
            with self.limited(compile_timeout(batch_size), "torch.compile"):
                self.compute(compile_teacher, teacher, batch_size)
        return teacher

    @contextmanager
    def teacher_anew(self) -> Iterator[Teacher]:
        """A teacher in float32, never compiled, loaded anew for this context alone; the shards' goes first, for its
        memory."""
        with self._lock:
            self._teacher = None
            setup = replace(self._setup, precision="float32")
            yield self.compute(_load, setup, self._device, self.threads)

    @contextmanager
    def limited(self, seconds: float, what: str = "a batch") -> Iterator[None]:
        """For a batch in the teacher. One that takes longer ends this process, if a nanny will start another."""
        if not self._worker.nanny:
            yield
            return
        with ended_after(seconds, lambda: self._tell(f"{what} hung in the teacher for {seconds:.0f} s")):
            yield

    def _tell(self, what: str) -> None:
        text = f"worker {self._worker.address} ends: {what}"
        self._worker.log_event(MESSAGE_TOPIC, {"run": self.run, "text": text})


def _load(setup: TeacherSetup, device: str, threads: int) -> Teacher:
    import torch

    from ..sam.device import resolve_device
    from ..sam.teacher import load_teacher

    where = resolve_device(device)
    if where.type == "cpu":
        # dask starts its workers with one OpenMP thread.
        torch.set_num_threads(threads)
        keep_freed_memory()
    teacher = load_teacher(
        setup.name,
        setup.checkpoint,
        image_size=setup.image_size,
        device=where,
        precision=setup.precision,
    )
    if teacher.checkpoint_sha256 != setup.checkpoint_sha256:
        raise PrecomputeError(
            f"the worker's checkpoint {setup.checkpoint} has SHA-256 {teacher.checkpoint_sha256[:16]}, the "
            f"coordinator's {setup.checkpoint_sha256[:16]}: give every worker the same file"
        )
    return teacher


def describe_worker(device: str, precision: str, version: str) -> tuple[str, str]:
    """The type of the device, and the precision, that are meant here by what is asked for; PrecomputeError when this
    worker's software is not the coordinator's `version`."""
    from ..sam.device import resolve_device, resolve_precision

    if version != __version__:
        raise PrecomputeError(
            f"a worker has mobilesam {__version__}, the coordinator {version}: install the same on both"
        )
    where = resolve_device(device)
    return where.type, resolve_precision(precision, where)


def measure_worker(device: str, precision: str) -> float:
    """Multiply-accumulates per second of this worker, with the threads that its teacher will have."""
    import torch

    from ..sam.device import resolve_device
    from .sizing import macs_per_second

    torch.set_num_threads(get_worker().state.nthreads)
    return macs_per_second(resolve_device(device), precision)


# --- A worker's teacher, translated by torch.compile.


def compile_teacher(teacher: Teacher, batch_size: int) -> None:
    """Translate the teacher for batches of `batch_size` images, now, by a first batch of nothing: no image waits for
    it then, nor does its time limit run. Weights keep their names.

    Raises PrecomputeError when torch.compile can't do it here.
    """
    import torch

    side = teacher.image_size
    try:
        # For this one shape: every batch of a job has it.
        teacher.image_encoder.compile(dynamic=False)
        teacher.embed(torch.zeros(batch_size, 3, side, side))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # As all of dynamo's and inductor's own are.
        fact = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PrecomputeError(
            f"torch.compile can't translate {teacher.name} on a worker ({fact}); leave out --compile, which changes "
            "no embedding by more than rounding"
        ) from error


# --- When a worker's process must end: with its coordinator, and when its teacher hangs.

TELLING_SECONDS = 1.0
"""For the last message to leave the process."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however that dies. Call it on the main thread.

    dask's workers watch their parent in a thread, which can't run while an image's decoder holds Python's lock.
    Linux only; elsewhere such a worker stays until it is killed by hand.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


@contextmanager
def ended_after(seconds: float, tell: Callable[[], None]) -> Iterator[None]:
    """Should the context last longer than `seconds`, `tell` and end the process: a thread that hangs in a library's
    code can't be stopped in any other way."""

    def end() -> None:
        tell()
        time.sleep(TELLING_SECONDS)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
