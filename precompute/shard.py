"""One shard on a worker: its images decoded, through the teacher, into its partial files."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from distributed import Worker, get_worker

from ..common.errors import PrecomputeError
from ..sam import refuse_keeping
from ..store import PIXELS_PER_CELL, RowResult, ShardWriter
from .decode import Batch, LoadedImage, decoded_batches
from .messages import BATCH_TOPIC, BatchDone, ShardResult, ShardTask, Span, Stopwatch
from .worker import TeacherPlugin

if TYPE_CHECKING:
    from torch import Tensor

    from ..sam.teacher import Teacher
    from .decode import Batch

WRITES_BEHIND = 2
"""Batches computed but not yet written, at most."""


def compute_shard(task: ShardTask, plugin_name: str) -> ShardResult:
    """Compute one shard into its partial files. Runs in a dask worker; raises StoreError when they can't be
    written, SamError or PrecomputeError when there is no teacher."""
    worker = get_worker()
    plugin: TeacherPlugin = worker.plugins[plugin_name]
    if not task.image_root.is_dir():
        raise PrecomputeError(
            f"worker {worker.address} sees no folder {task.image_root}: mount the images at the same path everywhere"
        )
    if task.kept_images is not None:
        refuse_keeping(task.layouts[0].item_shape[-1] * PIXELS_PER_CELL)
    attempt = uuid.uuid4().hex[:12]
    outcome = _Outcome(worker, BatchDone(run=plugin.run, shard=task.shard, attempt=attempt, rows=0, failed=0))
    slots = len(task.images)
    with (
        ShardWriter(task.store, task.layouts, task.shard, attempt, slots, task.kept_images) as writer,
        ThreadPoolExecutor(1, thread_name_prefix="write") as pool,
        closing(_batches(task, plugin.threads)) as batches,
    ):
        line = _Line(task, plugin, writer, outcome, pool)
        first = next(batches)  # decoded before the teacher is asked for
        with plugin.teacher() as teacher:
            for batch in chain([first], batches):
                line.launch(teacher, batch)
        # The teacher is another shard's by now: it needn't wait for the last of this one's.
        line.finish()
    _show_in_dask(worker, outcome.spans)
    return ShardResult(
        shard=task.shard,
        attempt=attempt,
        results=tuple(outcome.results),
        spans=tuple(outcome.spans),
        decode_seconds=outcome.decode_seconds,
        worker=str(worker.address),
    )


def _batches(task: ShardTask, threads: int) -> Generator[Batch]:
    """The shard's images, decoded ahead in `threads` threads."""
    side = task.layouts[0].item_shape[-1] * PIXELS_PER_CELL
    return decoded_batches(
        task.images,
        task.image_root,
        side,
        task.batch_size,
        threads,
        task.image_timeout,
        keep=task.kept_images is not None,
    )


class _Line:
    """A shard's batches between the teacher and the files: those that were launched, and those being written."""

    def __init__(
        self,
        task: ShardTask,
        plugin: TeacherPlugin,
        writer: ShardWriter,
        outcome: _Outcome,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._task, self._plugin, self._writer = task, plugin, writer
        self._outcome, self._pool = outcome, pool
        self._launched: deque[tuple[Batch, Embeddings]] = deque()
        self._writes: deque[Future[None]] = deque()
        self._busy = Stopwatch()

    def launch(self, teacher: Teacher, batch: Batch) -> None:
        """Give the teacher a batch, and take what it is through with."""
        if not self._launched:
            self._busy = Stopwatch()
        with self._plugin.limited(self._task.batch_timeout):
            self._launched.append((batch, self._plugin.compute(embed, teacher, batch)))
        if len(self._launched) > LAUNCHED_AHEAD[teacher.device.type]:
            self._collect()

    def finish(self) -> None:
        """Wait for everything, and make the files whole."""
        while self._launched:
            self._collect()
        for write in self._writes:
            write.result()
        with self._outcome.timed("write"):
            self._writer.finish()

    def _collect(self) -> None:
        """Wait for the oldest batch in the teacher, and have it written."""
        batch, embeddings = self._launched.popleft()
        with self._plugin.limited(self._task.batch_timeout):
            emb_BCHW = embeddings.numpy()
        self._outcome.spans.append(self._busy.span("teacher"))
        self._busy = Stopwatch()
        self._writes.append(self._pool.submit(self._write, batch, emb_BCHW))
        if len(self._writes) > WRITES_BEHIND:
            self._writes.popleft().result()

    def _write(self, batch: Batch, emb_BCHW: np.ndarray) -> None:
        first_row = self._task.images[0].row
        with self._outcome.timed("write"):
            results = [
                _write_row(self._writer, item, emb_CHW, item.image.row - first_row)
                for item, emb_CHW in zip(batch.images, emb_BCHW[: len(batch.images)], strict=True)
            ]
        self._outcome.add(batch, results)


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
        watch = Stopwatch()
        yield
        self.spans.append(watch.span(phase))

    def add(self, batch: Batch, results: list[RowResult]) -> None:
        """Keep a batch's results and report them to whoever listens."""
        self.results += results
        self.spans += [item.span for item in batch.images]
        self.decode_seconds += sum(item.cpu_seconds for item in batch.images)
        failed = sum(result.reason is not None for result in results)
        event = replace(self._event, rows=len(results), failed=failed)
        self._worker.log_event(BATCH_TOPIC, {"batch": asdict(event)})


def _write_row(writer: ShardWriter, item: LoadedImage, emb_CHW: np.ndarray, slot: int) -> RowResult:
    reason = item.reason
    stored = None
    if item.decoded is not None:
        try:
            stored = writer.add(slot, emb_CHW, item.kept)
        except ValueError as error:
            reason = str(error)
    return RowResult(
        row=item.image.row,
        reason=reason,
        sha256=item.sha256,
        bytes=item.bytes,
        original_size=None if item.decoded is None else item.decoded.original_size,
        resized_size=None if item.decoded is None else item.decoded.resized_size,
        crc32c=None if stored is None else stored.crc32c,
        scales_crc32c=None if stored is None else stored.scales_crc32c,
        kept=None if stored is None else stored.kept,
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
            plugin.compute(embed, teacher, batch).numpy()
    return True


# --- One batch through the teacher, and its embeddings back in the host's memory.

LAUNCHED_AHEAD = {"cpu": 0, "cuda": 1}
"""By type of device, batches given to the teacher while another's embeddings are awaited. A GPU would stand idle
between them; a CPU computes a batch where it is given."""


class Embeddings:
    """A batch's embeddings on their way from the device: nothing waits for them before `numpy` is called."""

    def __init__(self, emb_BCHW: Tensor) -> None:
        import torch

        self._emb_BCHW, self._arrived = emb_BCHW, None
        if emb_BCHW.device.type == "cuda":
            # Only pinned memory is copied to without the host's waiting.
            self._emb_BCHW = torch.empty(emb_BCHW.shape, dtype=emb_BCHW.dtype, pin_memory=True)
            self._emb_BCHW.copy_(emb_BCHW, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(emb_BCHW.device))

    def numpy(self) -> np.ndarray:
        """float32 (B, 256, g, g), once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        emb_BCHW: np.ndarray = self._emb_BCHW.numpy()
        return emb_BCHW


def embed(teacher: Teacher, batch: Batch) -> Embeddings:
    """Give a batch to the teacher. On a GPU this returns before it is computed."""
    import torch

    from ..sam import normalize_and_pad

    canvas_BHWC, sizes_B2 = torch.from_numpy(batch.canvas_BHWC), torch.from_numpy(batch.sizes_B2)
    if teacher.device.type == "cuda":
        canvas_BHWC, sizes_B2 = (
            tensor.pin_memory().to(teacher.device, non_blocking=True) for tensor in (canvas_BHWC, sizes_B2)
        )
    return Embeddings(teacher.embed(normalize_and_pad(canvas_BHWC, sizes_B2)))
