"""What the coordinator hears and sees of the workers while it waits for them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from distributed import Client, Future, KilledWorker

from ..common.errors import PrecomputeError, shown
from ..common.signals import StopFlag
from .cluster import START_SECONDS, Cluster
from .messages import MESSAGE_TOPIC, ShardTask, TaskImage
from .progress import Observer
from .shard import probe

POLL_SECONDS = 0.5
FETCH_SECONDS = 5.0
LOOK_SECONDS = 5.0
ABSENT_SECONDS = 30.0
"""Until absent workers are told of: one that is started anew takes less."""
TELL_SECONDS = 60.0
"""Between messages of that."""
SET_BACK_SECONDS = 60.0
"""The system clock may be set back by so much at once: for as long dask delivers nothing between processes, since its
streams of messages go by that clock."""


def fetch(future: Future) -> Any:
    """The result of a future that ended, or what it raised; None while it can't be had: it lies on its worker, which
    may hang or die before it is asked for. dask then computes it again."""
    if future.status not in ("pending", "lost"):
        try:
            return future.result(timeout=FETCH_SECONDS)
        except TimeoutError:
            if future.status == "error":
                raise  # the task's own
    time.sleep(POLL_SECONDS)
    return None


class StopAsked(Exception):
    """Waiting ended because a signal came."""


class Watch:
    """Passes on what workers of a run say, and tells when all have left and when some are back: without any, dask
    waits for ever and says nothing."""

    def __init__(self, cluster: Cluster, run: str, observer: Observer, stop: StopFlag) -> None:
        self._cluster = cluster
        self._run = run
        self._observer = observer
        self._stop = stop
        self._heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._clock: Callable[[], float] = time.monotonic
        self._ahead = time.time() - time.monotonic()
        self._looked = float("-inf")
        self._empty_since: float | None = None
        self._told: float | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear what workers say in the context."""
        client = self._cluster.client
        client.subscribe_topic(MESSAGE_TOPIC, self._hear)
        try:
            yield
        finally:
            if client.status == "running":
                client.unsubscribe_topic(MESSAGE_TOPIC)
            self._pass_on()

    def look(self) -> None:
        """To be called while waiting, as often as one likes.

        PrecomputeError when the scheduler has gone away, a local cluster's workers have for good, or the system clock
        was set back.
        """
        self._pass_on()
        self._refuse_clock_set_back()
        self._cluster.refuse_lost_connection()
        now = self._clock()
        # Whoever was told that they are absent waits for their return.
        if self._told is not None or now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._count(now)

    def result(self, future: Future) -> Any:
        """The future's result, or what it raised. StopAsked when a signal came first; PrecomputeError as `look`."""
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        while True:
            if done.wait(POLL_SECONDS) and (result := fetch(future)) is not None:
                return result
            if self._stop.signum is not None:
                future.cancel()
                raise StopAsked
            self.look()

    def _hear(self, event: tuple[float, dict]) -> None:
        # Called by dask on a thread of its own.
        if event[1]["run"] == self._run:
            self._heard.put(event[1]["text"])

    def _pass_on(self) -> None:
        while not self._heard.empty():
            self._observer.message(self._heard.get())

    def _refuse_clock_set_back(self) -> None:
        ahead = time.time() - time.monotonic()
        back, self._ahead = self._ahead - ahead, ahead
        if back > SET_BACK_SECONDS:
            raise PrecomputeError(
                f"the system clock was set back by {back:,.0f} s, and dask would deliver nothing until it has caught "
                "up; what is committed stays, run the same command to go on"
            )

    def _count(self, now: float) -> None:
        if workers := self._cluster.count_workers():
            if self._told is not None:
                self._observer.message(f"{workers} worker(s) at {self._cluster.address} again")
            self._empty_since = self._told = None
            return
        if self._empty_since is None:
            self._empty_since = now
        absent = now - self._empty_since
        if self._cluster.local and absent >= START_SECONDS:
            raise PrecomputeError(
                f"all worker processes ended {absent:.0f} s ago and none could be started again: is there memory for "
                "them? What is committed stays, run the same command to go on"
            )
        if absent >= ABSENT_SECONDS if self._told is None else now - self._told >= TELL_SECONDS:
            self._told = now
            self._observer.message(f"no workers at {self._cluster.address}; waiting")


# --- Finding the image that kills workers: halves of a shard are tried until single images are left.

REASON = "a worker process died each time it processed this image"


class SuspectHunt:
    """Bisects shards under which workers keep dying."""

    def __init__(self, client: Client, plugin_name: str, watch: Watch, observer: Observer) -> None:
        self._client = client
        self._plugin_name = plugin_name
        self._watch = watch
        self._observer = observer

    def exclude_killers(self, task: ShardTask) -> ShardTask:
        """The same shard with every image excluded that kills workers on its own.

        When none does, the shard is returned as it is: its workers died of something else. StopAsked when a signal
        came.
        """
        images = [image for image in task.images if image.excluded is None]
        self._observer.message(
            f"workers died under shard {task.shard}: looking for the image among {len(images)}"
        )
        killers = set(self._search_halves(task, images))
        for image in killers:
            self._observer.message(f"excluded: {shown(image.ref.key)}: {REASON}")
        return replace(
            task,
            images=tuple(
                replace(image, excluded=REASON) if image in killers else image for image in task.images
            ),
        )

    def _search(self, task: ShardTask, images: Sequence[TaskImage]) -> list[TaskImage]:
        """The killers among the images, by trying them together first."""
        if not images or self._survives(replace(task, images=tuple(images))):
            return []
        return list(images) if len(images) == 1 else self._search_halves(task, images)

    def _search_halves(self, task: ShardTask, images: Sequence[TaskImage]) -> list[TaskImage]:
        middle = len(images) // 2
        return self._search(task, images[:middle]) + self._search(task, images[middle:])

    def _survives(self, task: ShardTask) -> bool:
        try:
            return bool(self._watch.result(self._client.submit(probe, task, self._plugin_name, pure=False)))
        except KilledWorker:
            return False
