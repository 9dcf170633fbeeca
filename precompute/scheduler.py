"""The coordinator: shards out to workers, a bounded number at a time, and commits as they come back."""

from __future__ import annotations

import queue
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed import CancelledError, Future, KilledWorker
from distributed.comm import CommClosedError

from ..common.errors import PrecomputeError, shown
from ..common.signals import StopFlag
from ..sam import SamError
from ..store import EmbeddingStore, StoreError
from . import sizing
from .audit import Sample
from .cluster import Cluster
from .messages import BATCH_TOPIC, BatchDone, ShardResult, ShardTask, TaskImage
from .progress import Observer, Progress
from .shard import compute_shard
from .supervision import POLL_SECONDS, StopAsked, SuspectHunt, Watch, fetch
from .worker import TASKS_PER_WORKER, TeacherPlugin

TRIES = 3
"""Times that a shard is tried when it fails for a reason that may pass."""


@dataclass
class Tally:
    """What a job has measured: times in seconds since the epoch, `decode_seconds` of CPU, `slowest_batch` in seconds.
    `first_failure` names an image and why it failed."""

    committed: int = 0
    failed: int = 0
    decode_seconds: float = 0.0
    teacher_seconds: float = 0.0
    first_batch: float | None = None
    last_commit: float | None = None
    slowest_batch: float | None = None
    first_failure: str | None = None

    def add(self, result: ShardResult) -> None:
        """Count a committed shard."""
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


class Job:
    """Computes a store's pending shards on a cluster. One use: `run`."""

    def __init__(
        self,
        store: EmbeddingStore,
        cluster: Cluster,
        plugin: TeacherPlugin,
        batch_size: int,
        image_timeout: float,
        sample: Sample,
        progress: Progress,
        watch: Watch,
        observer: Observer,
        stop: StopFlag,
    ) -> None:
        self.tally = Tally()
        self._store = store
        self._cluster = cluster
        self._plugin = plugin
        self._batch_size = batch_size
        self._image_timeout = image_timeout
        self._sample = sample
        self._progress = progress
        self._watch = watch
        self._observer = observer
        self._stop = stop
        self._finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._flying: dict[Future, ShardTask] = {}
        self._tries: Counter[int] = Counter()
        self._failures: Counter[int] = Counter()
        self._hunt = SuspectHunt(cluster.client, plugin.name, watch, observer)

    def run(self, shards: Sequence[int], image_root: Path) -> Tally:
        """Compute and commit the shards; return early, with what is committed, when a stop is asked for. The cluster
        must be holding the plugin."""
        waiting = deque(shards)
        client = self._cluster.client
        client.subscribe_topic(BATCH_TOPIC, self._heard)
        try:
            while (waiting or self._flying) and self._stop.signum is None:
                self._watch.look()
                while waiting and len(self._flying) < self._cluster.workers * TASKS_PER_WORKER:
                    self._submit(self._task(waiting.popleft(), image_root))
                for future in self._wait():
                    self._settle(future)
                self._observer.progress(self._progress.snapshot())
            for future in self._ready():
                # Asked to stop: keep what is finished already.
                if future.status == "finished":
                    self._settle(future)
        finally:
            if client.status == "running":
                client.cancel(list(self._flying))
                client.unsubscribe_topic(BATCH_TOPIC)
        return self.tally

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
            batch_timeout=sizing.batch_timeout(self._batch_size, self.tally.slowest_batch),
            kept_images=self._store.spec.kept_images,
        )

    def _submit(self, task: ShardTask) -> None:
        future = self._cluster.client.submit(
            compute_shard,
            task,
            self._plugin.name,
            key=f"shard-{task.shard:06d}-{self._plugin.run}-{self._tries[task.shard]}",
            pure=False,
        )
        self._flying[future] = task
        future.add_done_callback(self._finished.put)

    def _wait(self) -> Iterable[Future]:
        try:
            first = self._finished.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return []
        return [first, *self._ready()]

    def _ready(self) -> list[Future]:
        ready = []
        while not self._finished.empty():
            ready.append(self._finished.get())
        return ready

    def _settle(self, future: Future) -> None:
        task = self._flying.pop(future, None)
        if task is None:
            return  # recalled before it ended
        try:
            result: ShardResult | None = fetch(future)
        except KilledWorker as error:
            self._suspect(task, error)
        except (SamError, StoreError, PrecomputeError):
            # Bad input or surroundings: trying again would not help.
            raise
        except Exception as error:  # noqa: BLE001 - whatever a worker raises is told, and tried again
            self._retry(task, error)
        else:
            if result is not None:
                self._commit(task, result)
                return
            self._flying[future] = task
            self._finished.put(future)

    def _commit(self, task: ShardTask, result: ShardResult) -> None:
        self._store.commit(task.shard, result.attempt, result.results)
        self.tally.add(result)
        self._sample.show(result.results)
        failed = [row for row in result.results if row.reason is not None]
        self._progress.committed(task.shard, result.attempt, len(result.results), len(failed))
        keys = {image.row: image.ref.key for image in task.images}
        for row in failed:
            what = f"{shown(keys[row.row])}: {row.reason}"
            self.tally.first_failure = self.tally.first_failure or what
            self._observer.message(f"failed: {what}")

    def _suspect(self, task: ShardTask, error: KilledWorker) -> None:
        """Look for the image that kills workers, with nothing else on them that could be killed along."""
        time.sleep(POLL_SECONDS)  # shards that were given up for the same deaths are heard of together
        killed = [task, *(other for future, other in self._flying.items() if future.status == "error")]
        again = [task, *self._flying.values()]
        self._cluster.client.cancel(list(self._flying))
        self._flying.clear()
        for dropped in again:
            self._progress.dropped(dropped.shard)
        try:
            cleared = self._first_cleared(killed)
        except StopAsked:
            return
        if cleared is None:
            self._retry(again.pop(0), error)
        for other in again:
            # One that merely ran beside the shard with the image is not to blame.
            self._submit_again(cleared if cleared and cleared.shard == other.shard else other)

    def _first_cleared(self, tasks: Sequence[ShardTask]) -> ShardTask | None:
        """The first of the shards that holds images which kill workers, without them; None when none does."""
        for task in tasks:
            cleared = self._hunt.exclude_killers(task)
            if cleared != task:
                return cleared
        return None

    def _retry(self, task: ShardTask, error: Exception) -> None:
        self._progress.dropped(task.shard)
        if isinstance(error, CancelledError | CommClosedError):
            self._cluster.refuse_lost_connection()
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise PrecomputeError(
                f"a worker has no memory for {self._batch_size} images at once: lower --batch-size"
            ) from error
        self._failures[task.shard] += 1
        if self._failures[task.shard] >= TRIES:
            raise PrecomputeError(
                f"shard {task.shard} failed {TRIES} times, last with {type(error).__name__}: {error}; "
                "what is committed stays, run the same command to go on"
            ) from error
        self._observer.message(f"shard {task.shard} is tried again after {type(error).__name__}: {error}")
        self._submit_again(task)

    def _submit_again(self, task: ShardTask) -> None:
        self._tries[task.shard] += 1
        self._submit(task)

    def _heard(self, event: tuple[float, dict]) -> None:
        batch = BatchDone(**event[1]["batch"])
        if batch.run == self._plugin.run:
            self._progress.batch(batch.shard, batch.attempt, batch.rows, batch.failed)
