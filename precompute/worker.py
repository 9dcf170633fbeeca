"""Dask worker plugin that holds one teacher, and time limits that end a hung worker's process.

A worker runs two shard tasks at a time (`shard.compute_shard`). The teacher serves one shard at a time, so that one
shard is decoded and another written while it computes a third's batches.
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
"""Shard tasks that a worker runs at a time: one is embedded, while the other is decoded or written."""

LAST_MESSAGE_SECONDS = 1.0
"""Time for a worker's last message to be sent before its process ends."""

_PR_SET_PDEATHSIG = 1


class TeacherPlugin(WorkerPlugin):
    """Dask plugin that holds a worker's teacher. The first task loads the teacher, so that errors reach the
    coordinator.

    Args:
        run: identifier of the precompute run.
        setup: description of the teacher.
    """

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
        # Workers of a local cluster are named 0, 1, ...: each takes its own device.
        place = worker.name if isinstance(worker.name, int) else 0
        self._device = self._setup.devices[place % len(self._setup.devices)]
        if self._device == "cpu":
            keep_freed_memory()  # before the threads that run tasks start
        # dask's executor has daemon threads: a teacher that hangs keeps no process from ending.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")

    def teardown(self, worker: Worker) -> None:
        """Release the teacher's thread; called by dask."""
        self._thread.shutdown(wait=False)

    def compute(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in the one thread that does all of the teacher's computations.

        Each thread that uses OpenMP gets its own team of threads. Two teams would have more threads than cores, and
        would then sleep at each barrier instead of spinning, which costs a tenth of the teacher's time on a CPU.

        Args:
            function: function to call.
            *args: its positional arguments.
            **kwargs: its keyword arguments.

        Returns:
            The function's result.

        Raises:
            BaseException: as raised by the function; RuntimeError for an endless recursion: dask can't send its
                traceback, and the coordinator would wait for ever.
        """
        try:
            result: T = self._thread.submit(function, *args, **kwargs).result()
        except RecursionError as error:
            raise RuntimeError(str(error)) from None
        return result

    @contextmanager
    def teacher(self) -> Iterator[Teacher]:
        """Give the worker's teacher to one thread at a time; the first call loads it, and compiles it if asked to.

        Raises:
            SamError: it can't be loaded.
            PrecomputeError: its checkpoint is not the coordinator's, or torch.compile fails.
        """
        with self._lock:
            if self._teacher is None:
                self._teacher = self._load_and_compile()
            yield self._teacher

    def _load_and_compile(self) -> Teacher:
        from .sizing import compile_timeout

        teacher = self.compute(_load, self._setup, self._device, self.threads)
        batch_size = self._setup.batch_size
        if self._setup.compile:
            with self.time_limit(compile_timeout(batch_size), "torch.compile"):
                self.compute(compile_teacher, teacher, batch_size)
        elif teacher.device.type == "cuda":
            with self.time_limit(compile_timeout(batch_size), "the first batch"):
                self.compute(warm_up, teacher, batch_size)
        return teacher

    @contextmanager
    def float32_teacher(self) -> Iterator[Teacher]:
        """Load a teacher in float32, never compiled, for the context. The shards' teacher is released first to free
        its memory."""
        with self._lock:
            self._teacher = None
            setup = replace(self._setup, precision="float32")
            yield self.compute(_load, setup, self._device, self.threads)

    @contextmanager
    def time_limit(self, seconds: float, what: str = "a batch") -> Iterator[None]:
        """End this process if the context takes longer, or meets an error of CUDA after which no call works.

        Without a nanny to restart it, there is no limit, and the error is raised.

        Args:
            seconds: time limit.
            what: work that is limited, for the message to the coordinator.
        """
        if not self._worker.nanny:
            yield
            return
        with exit_after(seconds, lambda: self._report(f"{what} hung in the teacher for {seconds:.0f} s")):
            try:
                yield
            except RuntimeError as error:
                if not leaves_cuda_unusable(error):
                    raise
                fact = next(iter(str(error).splitlines()))
                end_process(lambda: self._report(f"{fact}; another one takes its place"))

    def _report(self, reason: str) -> None:
        text = f"worker {self._worker.address} ends: {reason}"
        self._worker.log_event(MESSAGE_TOPIC, {"run": self.run, "text": text})


def _load(setup: TeacherSetup, device: str, threads: int) -> Teacher:
    import torch

    from ..sam.device import resolve_device
    from ..sam.teacher import load_teacher

    _refuse_other_package(setup)
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


def _refuse_other_package(setup: TeacherSetup) -> None:
    """Raise PrecomputeError unless this worker has the package of the coordinator's teacher, in its version."""
    from ..sam.registry import find_teacher_package, is_teacher

    found = find_teacher_package(setup.name) if is_teacher(setup.name) else None
    package = None if found is None else found[0]
    if package != setup.package:
        raise PrecomputeError(
            f"a worker has {package or 'no package'} for the teacher {setup.name}, the coordinator "
            f"{setup.package or 'has none'}: install the same on both"
        )


def warm_up(teacher: Teacher, batch_size: int) -> None:
    """Embed a batch of zeros: on a GPU the first one loads kernels, and compiles FlexAttention's.

    The time for that then doesn't count as the teacher's, nor against a batch's time limit.

    Args:
        teacher: teacher to use.
        batch_size: images of every batch that it will embed.
    """
    import torch

    side = teacher.image_size
    teacher.embed(torch.zeros(batch_size, 3, side, side)).cpu()


def compile_teacher(teacher: Teacher, batch_size: int) -> None:
    """Compile the teacher with torch.compile. The weights keep their names.

    A batch of zeros starts the compilation, so that it doesn't count against a batch's time limit.

    Args:
        teacher: teacher to compile, in place.
        batch_size: images of every batch that it will embed.

    Raises:
        PrecomputeError: torch.compile does not work here.
    """
    import torch

    try:
        # Every batch of a job has the same shape.
        teacher.image_encoder.compile(dynamic=False)
        warm_up(teacher, batch_size)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # All errors of dynamo and inductor are RuntimeErrors.
        fact = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PrecomputeError(
            f"torch.compile failed for {teacher.name} on a worker ({fact}); leave out --compile, which changes "
            "no embedding by more than rounding"
        ) from error


def describe_worker(device: str, precision: str, version: str) -> tuple[str, str]:
    """Resolve device and precision on a worker.

    Args:
        device: device asked for, such as "auto", "cpu" or "cuda:0".
        precision: precision asked for, one of `AUTO_PRECISIONS`.
        version: the coordinator's version of mobilesam.

    Returns:
        Type of the device ("cpu" or "cuda"), and the precision ("float32" or "bfloat16").

    Raises:
        PrecomputeError: the worker has another version.
    """
    from ..sam.device import resolve_device, resolve_precision

    if version != __version__:
        raise PrecomputeError(
            f"a worker has mobilesam {__version__}, the coordinator {version}: install the same on both"
        )
    where = resolve_device(device)
    return where.type, resolve_precision(precision, where)


def measure_worker(device: str, precision: str) -> float:
    """Measure this worker's speed, with the threads that its teacher will have.

    Args:
        device: device asked for, such as "auto", "cpu" or "cuda:0".
        precision: "float32" or "bfloat16".

    Returns:
        Multiply-accumulates per second.
    """
    import torch

    from ..sam.device import resolve_device
    from .sizing import measure_macs_per_second

    torch.set_num_threads(get_worker().state.nthreads)
    return measure_macs_per_second(resolve_device(device), precision)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies. Call it on the main thread.

    dask's workers watch their parent in a thread, which can't run while an image's decoder holds Python's global
    interpreter lock. Linux only; elsewhere such a worker stays until it is killed by hand.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def leaves_cuda_unusable(error: RuntimeError) -> bool:
    """Return True for an error of CUDA itself: all later calls of the process fail, too, other than after one of
    memory."""
    text = str(error)
    return text.startswith("CUDA error") and "out of memory" not in text


def end_process(report: Callable[[], None]) -> None:
    """End this process at once, a moment after `report`.

    Args:
        report: called first.
    """
    report()
    time.sleep(LAST_MESSAGE_SECONDS)
    os._exit(1)


@contextmanager
def exit_after(seconds: float, report: Callable[[], None]) -> Iterator[None]:
    """End the process if the context takes too long: a thread that hangs in a library can't be stopped otherwise.

    Args:
        seconds: time limit.
        report: called just before the process ends.
    """

    timer = threading.Timer(seconds, end_process, (report,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
