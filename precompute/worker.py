"""What a dask worker does: hold one teacher, and turn shard tasks into shard files.

A worker runs two shard tasks at a time. The teacher serves one shard at a time, so that one shard is decoded and
another written while it computes a third's batches.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from distributed import Worker, WorkerPlugin, get_worker

from .. import __version__
from ..store import PIXELS_PER_CELL, RowResult, ShardWriter
from .decoding import Batch, LoadedImage, decoded_batches
from .errors import PrecomputeError
from .process import die_with_parent, ended_after
from .tasks import BATCH_TOPIC, MESSAGE_TOPIC, BatchDone, ShardResult, ShardTask, Span, TeacherSetup

if TYPE_CHECKING:
    from ..sam.teachers import Teacher

TASKS_PER_WORKER = 2
"""Shard tasks that a worker runs at a time: one under the teacher, one decoding or writing."""

WRITES_BEHIND = 2
"""Batches computed but not yet written, at most."""


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

    @contextmanager
    def teacher(self) -> Iterator[Teacher]:
        """The worker's teacher, for one thread at a time."""
        with self._lock:
            if self._teacher is None:
                self._teacher = _load(self._setup, self._device, self.threads)
            yield self._teacher

    @contextmanager
    def teacher_anew(self) -> Iterator[Teacher]:
        """A teacher in float32, loaded anew for this context alone; the shards' goes first, for its memory."""
        with self._lock:
            self._teacher = None
            yield _load(replace(self._setup, precision="float32"), self._device, self.threads)

    @contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """For a batch in the teacher. One that takes longer ends this process, if a nanny will start another."""
        if not self._worker.nanny:
            yield
            return
        with ended_after(seconds, lambda: self._tell(f"a batch hung in the teacher for {seconds:.0f} s")):
            yield

    def _tell(self, what: str) -> None:
        text = f"worker {self._worker.address} ends: {what}"
        self._worker.log_event(MESSAGE_TOPIC, {"run": self.run, "text": text})


def _load(setup: TeacherSetup, device: str, threads: int) -> Teacher:
    import torch

    from ..sam.allocator import keep_freed_memory
    from ..sam.precision import resolve_device
    from ..sam.teachers import load_teacher

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
    from ..sam.precision import resolve_device, resolve_precision

    if version != __version__:
        raise PrecomputeError(
            f"a worker has mobilesam {__version__}, the coordinator {version}: install the same on both"
        )
    where = resolve_device(device)
    return where.type, resolve_precision(precision, where)


def measure_worker(device: str, precision: str) -> float:
    """Multiply-accumulates per second of this worker, with the threads that its teacher will have."""
    import torch

    from ..sam.precision import resolve_device
    from .sizing import macs_per_second

    torch.set_num_threads(get_worker().state.nthreads)
    return macs_per_second(resolve_device(device), precision)


def compute_shard(task: ShardTask, plugin_name: str) -> ShardResult:
    """Compute one shard into its partial files. Runs in a dask worker; raises StoreError when they can't be
    written, SamError or PrecomputeError when there is no teacher."""
    worker = get_worker()
    plugin: TeacherPlugin = worker.plugins[plugin_name]
    if not task.image_root.is_dir():
        raise PrecomputeError(
            f"worker {worker.address} sees no folder {task.image_root}: mount the images at the same path everywhere"
        )
    attempt = uuid.uuid4().hex[:12]
    outcome = _Outcome(worker, BatchDone(run=plugin.run, shard=task.shard, attempt=attempt, rows=0, failed=0))
    with (
        ShardWriter(task.store, task.layouts, task.shard, attempt, len(task.images)) as writer,
        ThreadPoolExecutor(1, thread_name_prefix="write") as pool,
        closing(_batches(task, plugin.threads)) as batches,
    ):
        first = next(batches)  # decoded before the teacher is asked for
        writes: deque[Future[None]] = deque()
        with plugin.teacher() as teacher:
            for batch in chain([first], batches):
                began = time.time()
                with plugin.limited(task.batch_timeout):
                    emb_BCHW = _embed(teacher, batch)
                outcome.spans.append(Span(phase="teacher", start=began, stop=time.time()))
                writes.append(pool.submit(_write, writer, batch, emb_BCHW, task.images[0].row, outcome))
                if len(writes) > WRITES_BEHIND:
                    writes.popleft().result()
        for write in writes:
            write.result()
        with outcome.timed("write"):
            writer.finish()
    _show_in_dask(worker, outcome.spans)
    return ShardResult(
        shard=task.shard,
        attempt=attempt,
        results=tuple(outcome.results),
        spans=tuple(outcome.spans),
        decode_seconds=outcome.decode_seconds,
        worker=str(worker.address),
    )


class _Outcome:
    """What a shard's batches have come to so far; filled by one thread at a time, spans by any."""

    def __init__(self, worker: Worker, event: BatchDone) -> None:
        self.results: list[RowResult] = []
        self.spans: list[Span] = []
        self.decode_seconds = 0.0
        self._worker = worker
        self._event = event

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.time()
        yield
        self.spans.append(Span(phase=phase, start=start, stop=time.time()))

    def add(self, batch: Batch, results: list[RowResult]) -> None:
        """Keep a batch's results and report them to whoever listens."""
        self.results += results
        self.spans += [item.span for item in batch.images]
        self.decode_seconds += sum(item.cpu_seconds for item in batch.images)
        failed = sum(result.reason is not None for result in results)
        event = replace(self._event, rows=len(results), failed=failed)
        self._worker.log_event(BATCH_TOPIC, {"batch": asdict(event)})


def _batches(task: ShardTask, threads: int) -> Generator[Batch]:
    side = task.layouts[0].item_shape[-1] * PIXELS_PER_CELL
    return decoded_batches(task.images, task.image_root, side, task.batch_size, threads, task.image_timeout)


def _embed(teacher: Teacher, batch: Batch) -> np.ndarray:
    import torch

    from ..sam import normalize_and_pad

    canvas_BHWC = torch.from_numpy(batch.canvas_BHWC)
    if teacher.device.type == "cuda":
        canvas_BHWC = canvas_BHWC.pin_memory().to(teacher.device, non_blocking=True)
    pixels_BCHW = normalize_and_pad(canvas_BHWC, torch.from_numpy(batch.sizes_B2).to(teacher.device))
    return teacher.embed(pixels_BCHW).cpu().numpy()


def _write(
    writer: ShardWriter, batch: Batch, emb_BCHW: np.ndarray, first_row: int, outcome: _Outcome
) -> None:
    with outcome.timed("write"):
        results = [
            _write_row(writer, item, emb_CHW, item.image.row - first_row)
            for item, emb_CHW in zip(batch.images, emb_BCHW[: len(batch.images)], strict=True)
        ]
    outcome.add(batch, results)


def _write_row(writer: ShardWriter, item: LoadedImage, emb_CHW: np.ndarray, slot: int) -> RowResult:
    reason = item.reason
    crc32c = scales_crc32c = None
    if item.decoded is not None:
        try:
            stored = writer.add(slot, emb_CHW)
            crc32c, scales_crc32c = stored.crc32c, stored.scales_crc32c
        except ValueError as error:
            reason = str(error)
    return RowResult(
        row=item.image.row,
        reason=reason,
        sha256=item.sha256,
        bytes=item.bytes,
        original_size=None if item.decoded is None else item.decoded.original_size,
        resized_size=None if item.decoded is None else item.decoded.resized_size,
        crc32c=crc32c,
        scales_crc32c=scales_crc32c,
    )


def _show_in_dask(worker: Worker, spans: list[Span]) -> None:
    """Add the phases to the task's own times, so that dask's task stream and performance report draw decoding
    (as disk-read) and writing (as disk-write) over the shard's bar."""
    actions = {"decode": "disk-read", "write": "disk-write"}
    task = worker.state.tasks[worker.get_current_task()]
    task.startstops += [
        {"action": actions[span.phase], "start": span.start, "stop": span.stop}
        for span in spans
        if span.phase in actions
    ]


def probe(task: ShardTask, plugin_name: str) -> bool:
    """Run images through decoding and teacher without writing anything: does the worker live?"""
    plugin: TeacherPlugin = get_worker().plugins[plugin_name]
    for batch in _batches(task, 1):
        with plugin.teacher() as teacher, plugin.limited(task.batch_timeout):
            _embed(teacher, batch)
    return True
