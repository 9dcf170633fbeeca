"""Reading and decoding a shard's images ahead of the teacher, batch by batch."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from ..common.errors import PrecomputeError
from ..common.image_ref import ImageRef
from ..sam import DecodedImage, ImageError, encode_kept, load_image, place_on_canvas, read_image
from .messages import Span, Stopwatch, TaskImage

BATCHES_AHEAD = 2
"""Decoded batches that wait for the teacher at most: enough to cover its work, few enough for memory."""


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """What became of a file: its pixels, or the `reason` why there are none. `cpu_seconds` were spent in `span`.

    `kept` is the file that the store keeps of the pixels, if it keeps any.
    """

    image: TaskImage
    decoded: DecodedImage | None
    kept: bytes | None
    reason: str | None
    sha256: str | None
    bytes: int | None
    span: Span
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images of consecutive rows; `canvas_BHWC` is uint8, `sizes_B2` int64 (height, width) of the image in it.

    There are always as many slots as the batch size: a failed image, and the slots past a shard's end, are black
    and of size 1 x 1, so that the other rows' arithmetic never depends on them.
    """

    images: tuple[LoadedImage, ...]
    canvas_BHWC: np.ndarray
    sizes_B2: np.ndarray


def decoded_batches(
    images: Sequence[TaskImage],
    root: Path,
    image_size: int,
    batch_size: int,
    threads: int,
    timeout: float,
    *,
    keep: bool = False,
) -> Generator[Batch]:
    """Yield the images in order, batch by batch, decoding ahead in `threads` threads; an image that takes one of them
    longer than `timeout` seconds fails. With `keep` they come with the files that a store keeps of them."""
    groups = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    waiting: deque[list[Job[LoadedImage]]] = deque()
    decoders = Decoders(threads, timeout, lambda image: load(image, root, image_size, keep=keep))

    def take() -> Batch:
        loaded = [decoders.result(job) or _timed_out(job, timeout) for job in waiting.popleft()]
        return _assemble(loaded, image_size, batch_size)

    try:
        for group in groups:
            waiting.append([decoders.submit(image) for image in group])
            if len(waiting) > BATCHES_AHEAD:
                yield take()
        while waiting:
            yield take()
    finally:
        decoders.close()


def load(image: TaskImage, root: Path, image_size: int, *, keep: bool = False) -> LoadedImage:
    """Read, hash, decode and resize one image; whatever is wrong with the file becomes the reason."""
    watch, cpu_start = Stopwatch(), time.thread_time()
    decoded = kept = sha256 = length = None
    reason = image.excluded
    if reason is None:
        try:
            data = read_image(root, image.ref.key, offset=image.ref.offset, size=_listed_size(image.ref))
            sha256, length = hashlib.sha256(data).hexdigest(), len(data)
            decoded = load_image(data, image_size)
            kept = encode_kept(decoded.pixels_HWC) if keep else None
        except ImageError as error:
            decoded, reason = None, str(error)
    return LoadedImage(
        image=image,
        decoded=decoded,
        kept=kept,
        reason=reason,
        sha256=sha256,
        bytes=length,
        span=watch.span("decode"),
        cpu_seconds=time.thread_time() - cpu_start,
    )


def _timed_out(job: Job[LoadedImage], timeout: float) -> LoadedImage:
    now = time.time()
    return LoadedImage(
        image=job.image,
        decoded=None,
        kept=None,
        reason=f"reading and decoding it took longer than {timeout:g} s (--image-timeout)",
        sha256=None,
        bytes=None,
        span=Span(phase="decode", start=now - timeout, stop=now),
        cpu_seconds=0.0,
    )


def _listed_size(image: ImageRef) -> int | None:
    # A file may have been replaced since it was listed, and is then taken as it is now; a tar's member can't.
    return None if image.offset is None else image.size


def _assemble(loaded: Sequence[LoadedImage], image_size: int, batch_size: int) -> Batch:
    canvas_BHWC = np.empty((batch_size, image_size, image_size, 3), dtype=np.uint8)
    canvas_BHWC[len(loaded) :] = 0
    sizes_B2 = np.ones((batch_size, 2), dtype=np.int64)
    for slot, item in enumerate(loaded):
        if item.decoded is None:
            canvas_BHWC[slot] = 0
        else:
            place_on_canvas(item.decoded, canvas_BHWC[slot])
            sizes_B2[slot] = item.decoded.resized_size
    return Batch(images=tuple(loaded), canvas_BHWC=canvas_BHWC, sizes_B2=sizes_B2)


# --- Threads that read and decode images, and that none of these can take away for good.

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
