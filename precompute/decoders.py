"""Threads that read and decode images, and that none of these can take away for good."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from .errors import PrecomputeError
from .tasks import TaskImage

STUCK_ALLOWED = 16
"""Threads of one process that may hang at a time: more are no matter of single images, but of what they lie on."""

Loaded = TypeVar("Loaded")

_stuck: list[threading.Thread] = []
_stuck_lock = threading.Lock()


class Job(Generic[Loaded]):
    """One image on its way through a thread. `began` in seconds of the monotonic clock, None while it waits."""

    def __init__(self, image: TaskImage) -> None:
        self.image = image
        self.began: float | None = None
        self.loaded: Loaded | None = None
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.abandoned = False

    @property
    def ended(self) -> bool:
        """Whether there is something to take from it."""
        return self.loaded is not None or self.error is not None


class Decoders(Generic[Loaded]):
    """`threads` threads that call `load` on images, in the order in which they are submitted.

    One that takes longer than `timeout` seconds is left to itself, and another takes its place. The threads are
    daemons: none of them keeps a process from ending. Results must be asked for in the order of submission, by one
    thread.
    """

    def __init__(self, threads: int, timeout: float, load: Callable[[TaskImage], Loaded]) -> None:
        self._timeout = timeout
        self._load = load
        self._waiting: queue.SimpleQueue[Job[Loaded] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._threads = threads
        self._closed = False
        for _ in range(threads):
            self._start_thread()

    def submit(self, image: TaskImage) -> Job[Loaded]:
        """Have an image loaded when its turn comes."""
        job: Job[Loaded] = Job(image)
        self._waiting.put(job)
        return job

    def result(self, job: Job[Loaded]) -> Loaded | None:
        """What `load` gave, or raised; None when it took longer than the timeout.

        PrecomputeError when too many threads hang at a time.
        """
        with self._changed:
            while not job.ended:
                # A job that waits has only such before it as ended, or were replaced: its turn comes.
                left = None if job.began is None else job.began + self._timeout - time.monotonic()
                if left is not None and left <= 0:
                    self._abandon(job)
                    return None
                self._changed.wait(left)
        if job.error is not None:
            raise job.error
        return job.loaded

    def close(self) -> None:
        """Let the threads end, once they are through with what they are at; nothing waits for them."""
        self._closed = True
        for _ in range(self._threads):
            self._waiting.put(None)

    def _start_thread(self) -> None:
        threading.Thread(target=self._work, name="decode", daemon=True).start()

    def _abandon(self, job: Job[Loaded]) -> None:
        job.abandoned = True
        self._start_thread()
        assert job.thread is not None
        with _stuck_lock:
            _stuck[:] = [thread for thread in _stuck if thread.is_alive()] + [job.thread]
            count = len(_stuck)
        if count > STUCK_ALLOWED:
            raise PrecomputeError(
                f"{count} images at once took longer than {self._timeout:g} s to read and decode: can the disk or "
                "server that they lie on be read? Then run the same command again, with a longer --image-timeout if "
                "it is slow"
            )

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None and not self._closed:
            with self._changed:
                job.thread = threading.current_thread()
                job.began = time.monotonic()
                self._changed.notify_all()
            loaded = error = None
            try:
                loaded = self._load(job.image)
            except BaseException as raised:  # noqa: BLE001 - it is raised where the result is asked for
                error = raised
            with self._changed:
                job.loaded, job.error = loaded, error
                self._changed.notify_all()
                if job.abandoned:
                    return
