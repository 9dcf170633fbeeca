"""Scheduler of shards in the coordinator: submits them to workers, a bounded number at a time, and commits them.

Each shard is one dask task, which calls `shard.compute_shard` on a worker. Only the coordinator writes to the
manifest.
"""

from __future__ import annotations

import queue
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed import CancelledError, Future, KilledWorker
from distributed.comm import CommClosedError

from ..common.errors import PrecomputeError, counted, shown
from ..sam import SamError
from ..store import EmbeddingStore, StoreError
from . import sizing
from .audit import ReservoirSample
from .messages import BATCH_TOPIC, BatchDone, ShardResult, ShardTask, TaskImage
from .progress import Progress
from .shard_task import compute_shard
from .supervision import POLL_SECONDS, ClusterMonitor, KillerImageSearch, StopRequested, fetch_result
from .worker import TASKS_PER_WORKER, TeacherPlugin

TRIES = 3
"""Attempts at a shard that fails for a reason that may be temporary."""


@dataclass
class RunTotals:
    """Sums over a run's committed shards."""

    committed: int = 0
    """Rows, failed ones included."""
    failed: int = 0
    """Rows without an embedding."""
    decode_seconds: float = 0.0
    """CPU time of reading and decoding."""
    teacher_seconds: float = 0.0
    """Time in which teachers were busy, summed over all workers."""
    first_batch: float | None = None
    """Start of the first teacher batch, in seconds since the epoch."""
    last_commit: float | None = None
    """Time of the last commit, in seconds since the epoch."""
    slowest_batch: float | None = None
    """Seconds of the slowest teacher batch."""
    first_failure: str | None = None
    """Key of the first failed image, and why it failed."""

    def add(self, result: ShardResult) -> None:
        """Add a committed shard."""
        teacher = [span for span in result.spans if span.phase == "teacher"]
        self.committed += len(result.results)
        self.failed += sum(row.reason is not None for row in result.results)
        self.decode_seconds += result.decode_seconds
        batches = [span.stop - span.start for span in teacher]
        self.teacher_seconds += sum(batches)
        self.slowest_batch = max([*batches, self.slowest_batch or 0.0])
        first = min(span.start for span in teacher)
        self.first_batch = first if self.first_batch is None else min(first, self.first_batch)
        self.last_commit = time.time()


class ShardScheduler:
    """Scheduler that computes a store's shards on a cluster and commits them; `run` may be called once.

    Args:
        store: store, open for writing.
        plugin: teacher plugin, which the cluster's workers must hold.
        monitor: monitor of the cluster.
        progress: counter of computed rows.
        sample: sample of committed rows for the audit.
        batch_size: images of a teacher batch.
        image_timeout: seconds for reading and decoding one image.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        plugin: TeacherPlugin,
        monitor: ClusterMonitor,
        progress: Progress,
        sample: ReservoirSample,
        batch_size: int,
        image_timeout: float,
    ) -> None:
        self.totals = RunTotals()
        self._store = store
        self._plugin = plugin
        self._monitor = monitor
        self._cluster = monitor.cluster
        self._progress = progress
        self._sample = sample
        self._batch_size = batch_size
        self._image_timeout = image_timeout
        self._ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._in_flight: dict[Future, ShardTask] = {}
        self._submissions: Counter[int] = Counter()
        self._failures: Counter[int] = Counter()
        self._search = KillerImageSearch(monitor, plugin.name)

    def run(self, shards: Sequence[int], image_root: Path) -> RunTotals:
        """Compute and commit shards. When a stop is requested, commit the finished ones and return early.

        Args:
            shards: numbers of pending shards.
            image_root: folder that the images' keys are relative to, the same on every machine.

        Returns:
            Sums over the committed shards.

        Raises:
            PrecomputeError: a shard failed `TRIES` times, or the cluster failed.
            SamError: the workers' teacher can't be loaded.
            StoreError: a shard can't be written or committed.
        """
        waiting = deque(shards)
        stop, client = self._monitor.stop, self._cluster.client
        client.subscribe_topic(BATCH_TOPIC, self._on_batch_done)
        try:
            while (waiting or self._in_flight) and stop.signum is None:
                self._monitor.check()
                while waiting and len(self._in_flight) < self._cluster.workers * TASKS_PER_WORKER:
                    self._submit(self._task(waiting.popleft(), image_root))
                for future in self._wait():
                    self._handle_ended(future)
                self._monitor.observer.progress(self._progress.snapshot())
            for future in self._take_ended():
                # After a request to stop: commit the shards that are finished.
                if future.status == "finished":
                    self._handle_ended(future)
        finally:
            if client.status == "running":
                client.cancel(list(self._in_flight))
                client.unsubscribe_topic(BATCH_TOPIC)
        return self.totals

    def _task(self, shard: int, image_root: Path) -> ShardTask:
        records = self._store.manifest.records(None, self._store.shard_rows(shard))
        return ShardTask(
            shard=shard,
            store=self._store.path.absolute(),
            layouts=self._store.spec.layouts,
            image_root=image_root,
            images=tuple(TaskImage(row=record.row, ref=record.ref) for record in records),
            batch_size=self._batch_size,
            image_timeout=self._image_timeout,
            batch_timeout=sizing.batch_timeout(self._batch_size, self.totals.slowest_batch),
            kept_images=self._store.spec.kept_images,
        )

    def _submit(self, task: ShardTask) -> None:
        future = self._cluster.client.submit(
            compute_shard,
            task,
            self._plugin.name,
            key=f"shard-{task.shard:06d}-{self._plugin.run}-{self._submissions[task.shard]}",
            pure=False,
        )
        self._submissions[task.shard] += 1
        self._in_flight[future] = task
        future.add_done_callback(self._ended.put)

    def _wait(self) -> Iterable[Future]:
        try:
            first = self._ended.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return []
        return [first, *self._take_ended()]

    def _take_ended(self) -> list[Future]:
        ended = []
        while not self._ended.empty():
            ended.append(self._ended.get())
        return ended

    def _handle_ended(self, future: Future) -> None:
        task = self._in_flight.pop(future, None)
        if task is None:
            return  # cancelled before it ended
        try:
            result: ShardResult | None = fetch_result(future)
        except KilledWorker as error:
            self._handle_killed_worker(task, error)
        except (SamError, StoreError, PrecomputeError):
            # Bad input or environment: another attempt would not help.
            raise
        except Exception as error:  # noqa: BLE001 - any other error of a worker is reported, and the shard retried
            self._retry(task, error)
        else:
            if result is not None:
                self._commit(task, result)
                return
            self._in_flight[future] = task
            self._ended.put(future)

    def _commit(self, task: ShardTask, result: ShardResult) -> None:
        self._store.commit(task.shard, result.attempt, result.results)
        self.totals.add(result)
        self._sample.add(result.results)
        failed = [row for row in result.results if row.reason is not None]
        self._progress.add_commit(task.shard, result.attempt, len(result.results), len(failed))
        keys = {image.row: image.ref.key for image in task.images}
        for row in failed:
            failure = f"{shown(keys[row.row])}: {row.reason}"
            self.totals.first_failure = self.totals.first_failure or failure
            self._monitor.observer.message(f"failed: {failure}")

    def _handle_killed_worker(self, task: ShardTask, error: KilledWorker) -> None:
        """Search for the image that kills workers, while no other shard is in flight that could die with it."""
        time.sleep(POLL_SECONDS)  # until other shards that failed by the same deaths are known
        killed = [task, *(other for future, other in self._in_flight.items() if future.status == "error")]
        again = [task, *self._in_flight.values()]
        self._cluster.client.cancel(list(self._in_flight))
        self._in_flight.clear()
        for dropped in again:
            self._progress.drop_attempt(dropped.shard)
        try:
            cleared = self._first_cleared(killed)
        except StopRequested:
            return
        if cleared is None:
            self._retry(again.pop(0), error)
        for other in again:
            # Shards that only ran beside the one with the image are submitted unchanged.
            self._submit(cleared if cleared and cleared.shard == other.shard else other)

    def _first_cleared(self, tasks: Sequence[ShardTask]) -> ShardTask | None:
        """Return the first shard with images that kill workers, those images excluded; None if there is none."""
        for task in tasks:
            cleared = self._search.exclude_killers(task)
            if cleared != task:
                return cleared
        return None

    def _retry(self, task: ShardTask, error: Exception) -> None:
        self._progress.drop_attempt(task.shard)
        if isinstance(error, CancelledError | CommClosedError):
            self._cluster.refuse_lost_connection()
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise PrecomputeError(
                f"a worker has no memory for {counted(self._batch_size, 'image')} at once: lower --batch-size"
            ) from error
        self._failures[task.shard] += 1
        if self._failures[task.shard] >= TRIES:
            raise PrecomputeError(
                f"shard {task.shard} failed {TRIES} times, last with {type(error).__name__}: {error}; "
                "what is committed stays, run the same command to resume"
            ) from error
        self._monitor.observer.message(f"retrying shard {task.shard} after {type(error).__name__}: {error}")
        self._submit(task)

    def _on_batch_done(self, event: tuple[float, dict]) -> None:
        batch = BatchDone(**event[1]["batch"])
        if batch.run == self._plugin.run:
            self._progress.add_batch(batch.shard, batch.attempt, batch.rows, batch.failed)
