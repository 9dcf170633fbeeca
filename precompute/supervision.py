"""Supervision of the workers: monitor of the cluster, and search for images that kill workers."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from distributed import Future, KilledWorker

from ..common.errors import PrecomputeError, counted, shown
from ..common.signals import StopFlag
from .cluster import START_SECONDS, Cluster
from .messages import MESSAGE_TOPIC, ShardTask, TaskImage
from .progress import Observer
from .shard_task import probe

POLL_SECONDS = 0.5
"""Longest wait before signals and the cluster are checked again."""
FETCH_SECONDS = 5.0
"""Longest wait for a result from the worker that holds it."""
COUNT_SECONDS = 5.0
"""Time between two counts of the workers."""
ABSENT_SECONDS = 30.0
"""Time without any worker after which that is reported; restarting a worker takes less."""
REPORT_SECONDS = 60.0
"""Time between two reports that there are no workers."""
SET_BACK_SECONDS = 60.0
"""Largest step back of the system clock that is tolerated. dask's message streams use that clock, and deliver nothing
until it has caught up."""

KILLED_REASON = "a worker process died each time it processed this image"


class StopRequested(Exception):
    """A signal came during a wait."""


class ClusterMonitor:
    """Monitor of a run's cluster.

    It forwards the workers' messages, and reports when all workers are gone and when some are back: without workers,
    dask waits for ever and says nothing.

    Args:
        cluster: connected cluster.
        run: identifier of the precompute run, by which its workers' messages are recognised.
        observer: receives the messages.
        stop: flag that a signal sets.
    """

    def __init__(self, cluster: Cluster, run: str, observer: Observer, stop: StopFlag) -> None:
        self.cluster = cluster
        self.observer = observer
        self.stop = stop
        self._run = run
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._clock: Callable[[], float] = time.monotonic
        self._clock_offset = time.time() - time.monotonic()
        self._counted = float("-inf")
        self._empty_since: float | None = None
        self._reported: float | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receive the workers' messages in the context."""
        client = self.cluster.client
        client.subscribe_topic(MESSAGE_TOPIC, self._receive)
        try:
            yield
        finally:
            if client.status == "running":
                client.unsubscribe_topic(MESSAGE_TOPIC)
            self._pass_on()

    def check(self) -> None:
        """Forward messages and check the cluster. Call it repeatedly while waiting.

        Raises:
            PrecomputeError: the connection to the scheduler is lost, a local cluster's workers can't be restarted, or
                the system clock was set back.
        """
        self._pass_on()
        self._refuse_clock_set_back()
        self.cluster.refuse_lost_connection()
        now = self._clock()
        # After a report that there are none, every check counts them, so that their return is reported at once.
        if self._reported is not None or now - self._counted >= COUNT_SECONDS:
            self._counted = now
            self._count(now)

    def result(self, future: Future) -> Any:
        """Wait for a future's result, or raise its exception.

        Raises:
            StopRequested: a signal came first; the future is cancelled.
            PrecomputeError: as raised by `check`.
        """
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        while True:
            if done.wait(POLL_SECONDS) and (result := fetch_result(future)) is not None:
                return result
            if self.stop.signum is not None:
                future.cancel()
                raise StopRequested
            self.check()

    def _receive(self, event: tuple[float, dict]) -> None:
        # dask calls this on another thread.
        if event[1]["run"] == self._run:
            self._messages.put(event[1]["text"])

    def _pass_on(self) -> None:
        while not self._messages.empty():
            self.observer.message(self._messages.get())

    def _refuse_clock_set_back(self) -> None:
        offset = time.time() - time.monotonic()
        back, self._clock_offset = self._clock_offset - offset, offset
        if back > SET_BACK_SECONDS:
            raise PrecomputeError(
                f"the system clock was set back by {back:,.0f} s, and dask would deliver nothing until it has caught "
                "up; what is committed stays, run the same command to resume"
            )

    def _count(self, now: float) -> None:
        if workers := self.cluster.count_workers():
            if self._reported is not None:
                self.observer.message(f"{counted(workers, 'worker')} at {self.cluster.address} again")
            self._empty_since = self._reported = None
            return
        if self._empty_since is None:
            self._empty_since = now
        absent = now - self._empty_since
        if self.cluster.local and absent >= START_SECONDS:
            raise PrecomputeError(
                f"all worker processes ended {absent:.0f} s ago and none could be started again: is there memory for "
                "them? What is committed stays, run the same command to resume"
            )
        due = absent >= ABSENT_SECONDS
        if self._reported is not None:
            due = now - self._reported >= REPORT_SECONDS
        if due:
            self._reported = now
            self.observer.message(f"no workers at {self.cluster.address}; waiting")


def fetch_result(future: Future) -> Any:
    """Fetch the result of a future that has ended, or raise its exception.

    Returns:
        The result; None if it can't be fetched now. It is held by its worker, which may hang or die first; dask then
        computes it again.
    """
    if future.status not in ("pending", "lost"):
        try:
            return future.result(timeout=FETCH_SECONDS)
        except TimeoutError:
            if future.status == "error":
                raise  # raised by the task itself
    time.sleep(POLL_SECONDS)
    return None


class KillerImageSearch:
    """Search by bisection for the images of a shard that kill workers.

    Args:
        monitor: monitor of the run's cluster.
        plugin_name: name of the teacher plugin that its workers hold.
    """

    def __init__(self, monitor: ClusterMonitor, plugin_name: str) -> None:
        self._monitor = monitor
        self._plugin_name = plugin_name

    def exclude_killers(self, task: ShardTask) -> ShardTask:
        """Find the images that kill a worker even when processed alone.

        Returns:
            The shard with those images excluded; the same shard if there are none, since its workers died of another
            cause.

        Raises:
            StopRequested: a signal came.
            PrecomputeError: as raised by `ClusterMonitor.check`.
        """
        images = [image for image in task.images if image.excluded is None]
        observer = self._monitor.observer
        observer.message(
            f"workers died under shard {task.shard}: looking for the image among its {len(images)}"
        )
        killers = set(self._search_halves(task, images))
        for image in killers:
            observer.message(f"excluded: {shown(image.ref.key)}: {KILLED_REASON}")
        return replace(
            task,
            images=tuple(
                replace(image, excluded=KILLED_REASON) if image in killers else image for image in task.images
            ),
        )

    def _search(self, task: ShardTask, images: Sequence[TaskImage]) -> list[TaskImage]:
        """Return the images that kill workers; all are tested together first."""
        if not images or self._survives(replace(task, images=tuple(images))):
            return []
        return list(images) if len(images) == 1 else self._search_halves(task, images)

    def _search_halves(self, task: ShardTask, images: Sequence[TaskImage]) -> list[TaskImage]:
        middle = len(images) // 2
        return self._search(task, images[:middle]) + self._search(task, images[middle:])

    def _survives(self, task: ShardTask) -> bool:
        client = self._monitor.cluster.client
        try:
            return bool(self._monitor.result(client.submit(probe, task, self._plugin_name, pure=False)))
        except KilledWorker:
            return False
