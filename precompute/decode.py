"""Images decoded ahead of the teacher, batch by batch, by a pool of threads that survives hung images.

Shape suffixes: B images of a batch, H, W rows and columns of an image, C channels, 2 (height, width).
"""

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

from ..common.errors import PrecomputeError, counted
from ..common.image_ref import ImageRef
from ..sam import DecodedImage, ImageError, encode_kept, load_image, place_on_canvas, read_image
from ..store import RowResult
from .messages import Span, Stopwatch, TaskImage

BATCHES_AHEAD = 2
"""Most decoded batches that wait for the teacher: enough to keep it busy, few enough for memory."""

HUNG_ALLOWED = 16
"""Threads of one process that may hang at a time. More of them indicate a fault of the disk or server."""

Loaded = TypeVar("Loaded")


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """One image after reading and decoding."""

    image: TaskImage
    result: RowResult
    """Result of the row so far: hash and length of the file, sizes, the reason if it failed."""
    decoded: DecodedImage | None
    """None if the image failed."""
    kept: bytes | None
    """Encoded resized image, in stores that keep images."""
    span: Span
    """Time of reading and decoding."""
    cpu_seconds: float
    """CPU time spent in `span`."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images of consecutive rows, on canvases for the teacher.

    There are always as many canvases as the batch size, so that other rows' arithmetic never depends on missing
    images: canvases of failed images and those past a shard's end are black, with an image size of 1 x 1.
    """

    images: tuple[LoadedImage, ...]
    canvas_BHWC: np.ndarray
    """uint8 RGB (B, S, S, 3), S the teacher's image size in pixels; each image in the top-left corner."""
    sizes_B2: np.ndarray
    """int64 (B, 2): (height, width) of the image on each canvas, in pixels."""


def decoded_batches(
    images: Sequence[TaskImage],
    root: Path,
    image_size: int,
    batch_size: int,
    threads: int,
    timeout: float,
    *,
    keep_images: bool = False,
) -> Generator[Batch]:
    """Decode images ahead of their use by a pool of threads, and yield them in order, batch by batch.

    Close the generator to end the threads.

    Args:
        images: images to decode, of consecutive rows.
        root: folder that the images' keys are relative to.
        image_size: side of the teacher's square, in pixels.
        batch_size: images of a batch; the last batch may have fewer, on as many canvases.
        threads: number of threads that decode.
        timeout: seconds of reading and decoding after which one image fails.
        keep_images: also encode each resized image for the store.

    Raises:
        PrecomputeError: more than `HUNG_ALLOWED` images hang at once.
    """
    groups = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    ahead: deque[list[DecodeFuture[LoadedImage]]] = deque()
    pool = DecodePool(threads, timeout, lambda image: load(image, root, image_size, keep_images=keep_images))

    def next_batch() -> Batch:
        loaded = [pool.result(future) or _timed_out(future.image, timeout) for future in ahead.popleft()]
        return _assemble(loaded, image_size, batch_size)

    try:
        for group in groups:
            ahead.append([pool.submit(image) for image in group])
            if len(ahead) > BATCHES_AHEAD:
                yield next_batch()
        while ahead:
            yield next_batch()
    finally:
        pool.close()


def load(image: TaskImage, root: Path, image_size: int, *, keep_images: bool = False) -> LoadedImage:
    """Read, hash, decode and resize one image.

    Args:
        image: image to load; one that is excluded is not read.
        root: folder that the image's key is relative to.
        image_size: side of the teacher's square, in pixels; the longer side is resized to it.
        keep_images: also encode the resized image for the store.

    Returns:
        The image; if its file can't be used, no exception is raised, and the result holds the reason.
    """
    watch, cpu_start = Stopwatch(), time.thread_time()
    decoded = kept = sha256 = length = None
    reason = image.excluded
    if reason is None:
        try:
            data = read_image(root, image.ref.key, offset=image.ref.offset, size=_listed_size(image.ref))
            sha256, length = hashlib.sha256(data).hexdigest(), len(data)
            decoded = load_image(data, image_size)
            kept = encode_kept(decoded.pixels_HWC) if keep_images else None
        except ImageError as error:
            decoded, reason = None, str(error)
    return LoadedImage(
        image=image,
        result=RowResult(
            row=image.row,
            reason=reason,
            sha256=sha256,
            bytes=length,
            original_size=None if decoded is None else decoded.original_size,
            resized_size=None if decoded is None else decoded.resized_size,
        ),
        decoded=decoded,
        kept=kept,
        span=watch.span("decode"),
        cpu_seconds=time.thread_time() - cpu_start,
    )


def _listed_size(image: ImageRef) -> int | None:
    # A file that was replaced since the listing is read as it is now. A tar's members can only be read as listed.
    return None if image.offset is None else image.size


def _timed_out(image: TaskImage, timeout: float) -> LoadedImage:
    now = time.time()
    reason = f"reading and decoding it took longer than {timeout:g} s (--image-timeout)"
    return LoadedImage(
        image=image,
        result=RowResult(row=image.row, reason=reason),
        decoded=None,
        kept=None,
        span=Span(phase="decode", start=now - timeout, stop=now),
        cpu_seconds=0.0,
    )


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


class DecodeFuture(Generic[Loaded]):
    """One image submitted to a decode pool.

    `started` is the time at which its decoding began, in seconds of the monotonic clock; None while it waits.
    """

    def __init__(self, image: TaskImage) -> None:
        self.image = image
        self.started: float | None = None
        self.loaded: Loaded | None = None
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.abandoned = False

    @property
    def done(self) -> bool:
        """True once there is a result or an error."""
        return self.loaded is not None or self.error is not None


class DecodePool(Generic[Loaded]):
    """Decode pool that survives hung images: a thread that exceeds the timeout is abandoned and replaced.

    The threads are daemons, so that a hung one doesn't keep the process from ending. Results must be requested in
    the order of submission, by one thread.

    Args:
        threads: number of threads.
        timeout: seconds that `load` may take for one image.
        load: function called on each image, in the order of submission.
    """

    def __init__(self, threads: int, timeout: float, load: Callable[[TaskImage], Loaded]) -> None:
        self._timeout = timeout
        self._load = load
        self._waiting: queue.SimpleQueue[DecodeFuture[Loaded] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._threads = threads
        self._closed = False
        for _ in range(threads):
            self._start_thread()

    def submit(self, image: TaskImage) -> DecodeFuture[Loaded]:
        """Queue an image to be loaded."""
        future: DecodeFuture[Loaded] = DecodeFuture(image)
        self._waiting.put(future)
        return future

    def result(self, future: DecodeFuture[Loaded]) -> Loaded | None:
        """Wait for an image.

        Returns:
            The result of `load`; None if it took longer than the timeout.

        Raises:
            PrecomputeError: more than `HUNG_ALLOWED` threads of this process hang.
            BaseException: as raised by `load`.
        """
        with self._changed:
            while not future.done:
                # Every image before this one has ended or was abandoned, so that a thread will take it.
                left = None if future.started is None else future.started + self._timeout - time.monotonic()
                if left is not None and left <= 0:
                    self._abandon(future)
                    return None
                self._changed.wait(left)
        if future.error is not None:
            raise future.error
        return future.loaded

    def close(self) -> None:
        """Ask each thread to end after its current image; don't wait for them."""
        self._closed = True
        for _ in range(self._threads):
            self._waiting.put(None)

    def _start_thread(self) -> None:
        threading.Thread(target=self._work, name="decode", daemon=True).start()

    def _abandon(self, future: DecodeFuture[Loaded]) -> None:
        future.abandoned = True
        self._start_thread()
        assert future.thread is not None
        count = _count_hung(future.thread)
        if count > HUNG_ALLOWED:
            raise PrecomputeError(
                f"{counted(count, 'image')} at once took longer than {self._timeout:g} s to read and "
                "decode: check the disk or "
                "server that holds them, then run the same command again, with a longer --image-timeout if it is "
                "only slow"
            )

    def _work(self) -> None:
        while (future := self._waiting.get()) is not None and not self._closed:
            with self._changed:
                future.thread = threading.current_thread()
                future.started = time.monotonic()
                self._changed.notify_all()
            loaded = error = None
            try:
                loaded = self._load(future.image)
            except BaseException as raised:  # noqa: BLE001 - `result` raises it
                error = raised
            with self._changed:
                future.loaded, future.error = loaded, error
                self._changed.notify_all()
                if future.abandoned:
                    return


_hung: list[threading.Thread] = []
_hung_lock = threading.Lock()


def _count_hung(thread: threading.Thread) -> int:
    """Add a hung thread, and return the number of this process's threads that still hang."""
    with _hung_lock:
        _hung[:] = [other for other in _hung if other.is_alive()] + [thread]
        return len(_hung)
