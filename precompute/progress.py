"""Progress of a precompute run, counted in images, and the observers that receive it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Progress of a run at one moment."""

    images: int
    """Rows of the store."""
    done_before: int
    """Rows committed before this run, failed ones included."""
    computed: int
    """Rows computed so far, committed or not, failed ones and `done_before` included."""
    failed: int
    """Failed rows among `computed`."""
    images_per_second: float | None
    """Rate of this run; None until two images are computed."""
    eta: float | None
    """Estimated seconds until the last image; None while there is no rate."""


class Observer(Protocol):
    """Receiver of a run's messages and progress.

    One that also has a method `phase(text)` is told what begins, where there are no images to count.
    """

    def message(self, text: str) -> None:
        """Receive a message for the user: one line, or a few."""

    def download(self, done: int, total: int) -> None:
        """Receive the progress of a checkpoint's download.

        Args:
            done: bytes downloaded so far.
            total: bytes of the file.
        """

    def progress(self, snapshot: Snapshot) -> None:
        """Receive the progress, about twice a second and after each commit."""


def begin_phase(observer: Observer, text: str) -> None:
    """Tell an observer that takes phases what begins.

    Args:
        observer: the observer.
        text: the work.
    """
    phase = getattr(observer, "phase", None)
    if phase is not None:
        phase(text)


class SilentObserver:
    """Observer that ignores everything; its methods are those of `Observer`."""

    def message(self, text: str) -> None: ...

    def download(self, done: int, total: int) -> None: ...

    def progress(self, snapshot: Snapshot) -> None: ...


class Progress:
    """Counter of committed rows, and of rows that workers have reported from shards not yet committed.

    Of a shard that is retried, only the latest attempt counts.

    Args:
        images: rows of the store.
        done_before: rows committed before this run, failed ones included.
        failed_before: failed rows among them.
    """

    def __init__(self, images: int, done_before: int, failed_before: int) -> None:
        self._images = images
        self._done_before = done_before
        self._committed = 0
        self._failed = failed_before
        self._in_flight: dict[int, tuple[str, int, int]] = {}
        self._committed_attempts: set[str] = set()
        self._started: float | None = None
        self._clock: Callable[[], float] = time.monotonic

    def add_batch(self, shard: int, attempt: str, rows: int, failed: int) -> None:
        """Count rows of a shard that a worker has computed. A report that arrives after the commit is ignored.

        Args:
            shard: number of the shard.
            attempt: name of the attempt.
            rows: rows of the batch, failed ones included.
            failed: failed rows among them.
        """
        if attempt in self._committed_attempts:
            return
        self._start()
        known, before, failed_before = self._in_flight.get(shard, (attempt, 0, 0))
        if known != attempt:
            before = failed_before = 0
        self._in_flight[shard] = (attempt, before + rows, failed_before + failed)

    def add_commit(self, shard: int, attempt: str, rows: int, failed: int) -> None:
        """Count a committed shard, in place of the batches reported for it.

        Args:
            shard: number of the shard.
            attempt: name of the attempt that was committed.
            rows: rows of the shard, failed ones included.
            failed: failed rows among them.
        """
        self._start()
        self._committed_attempts.add(attempt)
        self._in_flight.pop(shard, None)
        self._committed += rows
        self._failed += failed

    def drop_attempt(self, shard: int) -> None:
        """Forget a failed attempt at a shard."""
        self._in_flight.pop(shard, None)

    def snapshot(self) -> Snapshot:
        """Return the progress now."""
        in_flight = list(self._in_flight.values())
        here = self._committed + sum(rows for _, rows, _ in in_flight)
        elapsed = None if self._started is None else self._clock() - self._started
        # `elapsed` doesn't include the first batch's own time, so one image alone gives no rate.
        rate = here / elapsed if elapsed and here > 1 else None
        return Snapshot(
            images=self._images,
            done_before=self._done_before,
            computed=self._done_before + here,
            failed=self._failed + sum(failed for _, _, failed in in_flight),
            images_per_second=rate,
            eta=None if rate is None else (self._images - self._done_before - here) / rate,
        )

    def _start(self) -> None:
        if self._started is None:
            self._started = self._clock()
