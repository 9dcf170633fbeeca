"""How far a job is, counted in images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """`images` in the store, of which `done_before` this run were committed, `computed` (failed ones included)
    are now, committed or about to be, and `failed` of all these are. `images_per_second` is of this run, None
    until the first batch is through; `eta` in seconds."""

    images: int
    done_before: int
    computed: int
    failed: int
    images_per_second: float | None
    eta: float | None


class Observer(Protocol):
    """What a caller may want to hear of a running job."""

    def message(self, text: str) -> None:
        """A line that matters once."""

    def download(self, done: int, total: int) -> None:
        """Bytes of a checkpoint downloaded so far, of how many."""

    def progress(self, snapshot: Snapshot) -> None:
        """Called about twice a second, and after each commit."""


class Silent:
    """An observer that doesn't listen."""

    def message(self, text: str) -> None: ...

    def download(self, done: int, total: int) -> None: ...

    def progress(self, snapshot: Snapshot) -> None: ...


class Progress:
    """Counts committed rows, and those that workers have reported of shards not yet committed.

    A shard that is tried again counts by its latest attempt only.
    """

    def __init__(self, images: int, done_before: int, failed_before: int) -> None:
        self._images = images
        self._done_before = done_before
        self._committed = 0
        self._failed = failed_before
        self._flying: dict[int, tuple[str, int, int]] = {}
        self._settled: set[str] = set()
        self._first: float | None = None
        self._clock: Callable[[], float] = time.monotonic

    def batch(self, shard: int, attempt: str, rows: int, failed: int) -> None:
        """A worker has computed rows of a shard. It may be heard of after the shard's commit."""
        if attempt in self._settled:
            return
        self._start()
        known, before, failed_before = self._flying.get(shard, (attempt, 0, 0))
        if known != attempt:
            before = failed_before = 0
        self._flying[shard] = (attempt, before + rows, failed_before + failed)

    def committed(self, shard: int, attempt: str, rows: int, failed: int) -> None:
        """A shard is committed."""
        self._start()
        self._settled.add(attempt)
        self._flying.pop(shard, None)
        self._committed += rows
        self._failed += failed

    def dropped(self, shard: int) -> None:
        """An attempt at a shard came to nothing."""
        self._flying.pop(shard, None)

    def _start(self) -> None:
        if self._first is None:
            self._first = self._clock()

    def snapshot(self) -> Snapshot:
        """The state now."""
        flying = list(self._flying.values())
        here = self._committed + sum(rows for _, rows, _ in flying)
        elapsed = None if self._first is None else self._clock() - self._first
        # The first batch's own time is not in `elapsed`, so the rate is not told before there are two.
        speed = here / elapsed if elapsed and here > 1 else None
        return Snapshot(
            images=self._images,
            done_before=self._done_before,
            computed=self._done_before + here,
            failed=self._failed + sum(failed for _, _, failed in flying),
            images_per_second=speed,
            eta=None if speed is None else (self._images - self._done_before - here) / speed,
        )
