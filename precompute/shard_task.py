"""Compute one shard on a worker; `compute_shard` is the function of its dask task.

Images are decoded ahead, embedded batch by batch by the worker's teacher, and written into partial files, which the
coordinator commits (scheduler.py). Decoding and writing of one shard overlap the teacher's work on another.

Shape suffixes: B images of a batch, C channels, H, W rows and columns of an image or of the embedding grid,
2 (height, width).
"""

from __future__ import annotations

import os
import uuid
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from distributed import Worker, get_worker

from ..common.errors import PrecomputeError
from ..sam import refuse_keeping
from ..sam.photos.tar_files import place_on_disk
from ..store import RowResult, ShardWriter
from ..store.writer import CarriedRows
from .decode import Batch, LoadedImage, decoded_batches
from .messages import BATCH_TOPIC, BatchDone, ShardResult, ShardTask, Span, Stopwatch
from .worker import TeacherPlugin

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..sam.teacher import Teacher

LAUNCHED_AHEAD = {"cpu": 0, "cuda": 1}
"""Batches given to the teacher before an earlier batch's embeddings are fetched, by type of device. Without one, a
GPU would be idle between batches; a CPU computes a batch during the call."""

WRITES_BEHIND = 2
"""Most computed batches that wait to be written."""


def compute_shard(task: ShardTask, plugin_name: str) -> ShardResult:
    """Compute one shard into partial files. Runs in a dask worker.

    Args:
        task: shard to compute.
        plugin_name: name of the `TeacherPlugin` that the worker holds.

    Returns:
        Results and times of the shard, whose partial files are complete.

    Raises:
        StoreError: the partial files can't be written.
        SamError: the teacher can't be loaded, or images can't be kept on this worker.
        PrecomputeError: the worker sees no images, has another checkpoint, or its disk hangs.
    """
    worker = get_worker()
    plugin: TeacherPlugin = worker.plugins[plugin_name]
    _refuse_unusable_worker(task, worker)
    attempt = uuid.uuid4().hex[:12]
    outcome = _ShardOutcome(
        worker, BatchDone(run=plugin.run, shard=task.shard, attempt=attempt, rows=0, failed=0)
    )
    slots = len(task.images)
    with (
        ShardWriter(task.store, task.layouts, task.shard, attempt, slots, task.kept_images) as writer,
        ThreadPoolExecutor(1, thread_name_prefix="write") as pool,
        closing(_batches(task, plugin.threads)) as batches,
    ):
        pipeline = _ShardPipeline(task, plugin, writer, outcome, pool)
        first = next(batches)  # decoded before the teacher is taken
        with plugin.teacher() as teacher:
            for batch in chain([first], batches):
                pipeline.launch(teacher, batch)
        # The teacher is free for another shard, while this one's last batches are written.
        pipeline.finish()
    _show_in_dask(worker, outcome.spans)
    return ShardResult(
        shard=task.shard,
        attempt=attempt,
        results=tuple(outcome.results),
        spans=tuple(outcome.spans),
        decode_seconds=outcome.decode_seconds,
        worker=str(worker.address),
    )


def probe(task: ShardTask, plugin_name: str) -> bool:
    """Decode and embed images without writing anything, to test if they kill the worker. Runs in a dask worker.

    Args:
        task: images to test.
        plugin_name: name of the `TeacherPlugin` that the worker holds.

    Returns:
        True: the worker has survived.

    Raises:
        SamError: the teacher can't be loaded.
        PrecomputeError: the worker has another checkpoint, or its disk hangs.
    """
    plugin: TeacherPlugin = get_worker().plugins[plugin_name]
    for batch in _batches(task, 1):
        with plugin.teacher() as teacher, plugin.time_limit(task.batch_timeout):
            plugin.compute(embed, teacher, batch).numpy()
    return True


def _refuse_unusable_worker(task: ShardTask, worker: Worker) -> None:
    # The root itself may be gone from where photos beside it are read.
    places = (Path(place_on_disk(task.image_root, image.ref.key)).parent for image in task.images)
    if not any(place.is_dir() for place in chain([task.image_root], places)):
        raise PrecomputeError(
            f"worker {worker.address} sees no folder {task.image_root}: mount the images at the same path everywhere"
        )
    if task.kept_images is not None:
        refuse_keeping(task.image_size)


def _batches(task: ShardTask, threads: int) -> Generator[Batch]:
    return decoded_batches(
        task.images,
        task.image_root,
        task.image_size,
        task.batch_size,
        threads,
        task.image_timeout,
        keep_images=task.kept_images is not None,
    )


class _ShardPipeline:
    """Batches of one shard between the teacher and the partial files: those launched, and those being written."""

    def __init__(
        self,
        task: ShardTask,
        plugin: TeacherPlugin,
        writer: ShardWriter,
        outcome: _ShardOutcome,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._task, self._plugin, self._writer = task, plugin, writer
        self._carried = CarriedRows(task.store, task.layouts, task.shard)
        self._outcome, self._pool = outcome, pool
        self._launched: deque[tuple[Batch, Embeddings]] = deque()
        self._writes: deque[Future[None]] = deque()
        self._busy = Stopwatch()

    def launch(self, teacher: Teacher, batch: Batch) -> None:
        """Give a batch to the teacher, and collect the oldest one if more than `LAUNCHED_AHEAD` are launched."""
        if not self._launched:
            self._busy = Stopwatch()
        with self._plugin.time_limit(self._task.batch_timeout):
            self._launched.append((batch, self._plugin.compute(embed, teacher, batch)))
        if len(self._launched) > LAUNCHED_AHEAD[teacher.device.type]:
            self._collect()

    def finish(self) -> None:
        """Wait for all batches, and finish the files."""
        while self._launched:
            self._collect()
        for write in self._writes:
            write.result()
        with self._outcome.timed("write"):
            self._writer.finish()

    def _collect(self) -> None:
        """Wait for the oldest launched batch, and queue it for writing."""
        batch, embeddings = self._launched.popleft()
        with self._plugin.time_limit(self._task.batch_timeout):
            emb_BCHW = embeddings.numpy()
        self._outcome.spans.append(self._busy.span("teacher", embeddings.device_seconds))
        self._busy = Stopwatch()
        self._writes.append(self._pool.submit(self._write, batch, emb_BCHW))
        if len(self._writes) > WRITES_BEHIND:
            self._writes.popleft().result()

    def _write(self, batch: Batch, emb_BCHW: np.ndarray) -> None:
        with self._outcome.timed("write"):
            results = [
                self._write_row(item, emb_CHW)
                for item, emb_CHW in zip(batch.images, emb_BCHW[: len(batch.images)], strict=True)
            ]
        self._outcome.add(batch, results)

    def _write_row(self, item: LoadedImage, emb_CHW: np.ndarray) -> RowResult:
        slot = item.image.row - self._task.images[0].row
        if item.decoded is None:
            return self._carry_over(item, slot) or item.result
        try:
            stored = self._writer.add(slot, emb_CHW, item.kept)
        except ValueError as error:
            return replace(item.result, reason=str(error))
        return replace(
            item.result, crc32c=stored.crc32c, scales_crc32c=stored.scales_crc32c, kept=stored.kept
        )

    def _carry_over(self, item: LoadedImage, slot: int) -> RowResult | None:
        """Write the row that the shard had before it was withdrawn, if the image's file is gone since; else None."""
        if item.image.excluded or os.path.lexists(place_on_disk(self._task.image_root, item.image.ref.key)):
            return None
        carried = self._carried.read(item.image.row)
        if carried is None:
            return None
        stored = self._writer.add_stored(slot, carried.items, carried.image)
        return replace(carried.result, kept=stored.kept)


class _ShardOutcome:
    """Results and times of a shard so far. Only one thread adds results; any thread may add spans."""

    def __init__(self, worker: Worker, event: BatchDone) -> None:
        self.results: list[RowResult] = []
        self.spans: list[Span] = []
        self.decode_seconds = 0.0
        self._worker = worker
        self._event = event

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent in the context as a span."""
        watch = Stopwatch()
        yield
        self.spans.append(watch.span(phase))

    def add(self, batch: Batch, results: list[RowResult]) -> None:
        """Add a batch's results, and report them to the coordinator."""
        self.results += results
        self.spans += [item.span for item in batch.images]
        self.decode_seconds += sum(item.cpu_seconds for item in batch.images)
        failed = sum(result.reason is not None for result in results)
        event = replace(self._event, rows=len(results), failed=failed)
        self._worker.log_event(BATCH_TOPIC, {"batch": asdict(event)})


def _show_in_dask(worker: Worker, spans: list[Span]) -> None:
    """Add the spans to the task's times, so that dask's task stream and performance report show decoding (as
    disk-read) and writing (as disk-write) on the shard's bar."""
    actions = {"decode": "disk-read", "write": "disk-write"}
    task = worker.state.tasks[worker.get_current_task()]
    task.startstops += [
        {"action": actions[span.phase], "start": span.start, "stop": span.stop}
        for span in spans
        if span.phase in actions
    ]


def embed(teacher: Teacher, batch: Batch) -> Embeddings:
    """Embed a batch. On a GPU this returns before the embeddings are computed.

    Args:
        teacher: teacher of the worker.
        batch: canvases uint8 (B, S, S, 3) with their images' sizes.

    Returns:
        The embeddings, which `Embeddings.numpy` waits for.
    """
    import torch

    from ..sam import normalize_and_pad

    canvas_BHWC, sizes_B2 = torch.from_numpy(batch.canvas_BHWC), torch.from_numpy(batch.sizes_B2)
    begun = None
    if teacher.device.type == "cuda":
        canvas_BHWC, sizes_B2 = (
            tensor.pin_memory().to(teacher.device, non_blocking=True) for tensor in (canvas_BHWC, sizes_B2)
        )
        begun = _recorded(teacher.device)
    return Embeddings(teacher.embed(normalize_and_pad(canvas_BHWC, sizes_B2)), begun)


def _recorded(device: torch.device) -> torch.cuda.Event:
    """Return an event of the device's current stream; waiting for it leaves the core to other threads."""
    import torch

    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


class Embeddings:
    """Embeddings of a batch, being copied from the device to the host. Only `numpy` waits for them.

    Args:
        emb_BCHW: float32 (B, 256, g, g), g the side of the embedding grid, on the teacher's device.
        begun: event before the first of the batch's computations; None on a CPU.

    Attributes:
        device_seconds: after `numpy`, seconds that the GPU took for the batch, its waits left out; None on a CPU.
    """

    def __init__(self, emb_BCHW: Tensor, begun: torch.cuda.Event | None = None) -> None:
        import torch

        self._emb_BCHW, self._begun, self._arrived = emb_BCHW, begun, None
        self.device_seconds: float | None = None
        if emb_BCHW.device.type == "cuda":
            computed = _recorded(emb_BCHW.device)
            # A copy that doesn't block the host needs pinned memory.
            self._emb_BCHW = torch.empty(emb_BCHW.shape, dtype=emb_BCHW.dtype, pin_memory=True)
            self._emb_BCHW.copy_(emb_BCHW, non_blocking=True)
            self._computed, self._arrived = computed, _recorded(emb_BCHW.device)

    def numpy(self) -> np.ndarray:
        """Wait for the embeddings; return them as float32 (B, 256, g, g)."""
        if self._arrived is not None:
            self._arrived.synchronize()
            if self._begun is not None:
                self.device_seconds = self._begun.elapsed_time(self._computed) / 1000
        emb_BCHW: np.ndarray = self._emb_BCHW.numpy()
        return emb_BCHW
