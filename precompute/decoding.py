"""Reading and decoding a shard's images ahead of the teacher, batch by batch."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..sam import DecodedImage, ImageError, encode_kept, load_image, place_on_canvas, read_image
from .decoders import Decoders, Job
from .tasks import Span, Stopwatch, TaskImage

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
            data = read_image(root, image.key, offset=image.offset, size=_listed_size(image))
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


def _listed_size(image: TaskImage) -> int | None:
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
