"""What travels between coordinator and workers: row numbers and keys out, records and numbers back; never arrays."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ..common.image_ref import ImageRef
from ..store import ArrayLayout, Audit, RowResult

BATCH_TOPIC = "mobilesam-batch"
"""Topic of the events by which workers report rows as they finish, before their shard is committed."""

MESSAGE_TOPIC = "mobilesam-message"
"""Topic of the events by which workers say what matters once."""


@dataclass(frozen=True, kw_only=True)
class TeacherSetup:
    """How a worker makes its teacher: on one of the `devices`, with `threads` for torch on a CPU and for decoding
    (None: as many as the worker has). With `compiled_batch`, torch.compile translates it for batches of so many
    images. `local` workers are children of the coordinator, and die with it."""

    name: str
    checkpoint: Path | None
    checkpoint_sha256: str
    image_size: int
    precision: str
    compiled_batch: int | None
    devices: tuple[str, ...]
    threads: int | None
    local: bool


@dataclass(frozen=True, kw_only=True)
class TaskImage:
    """One image of a shard. With `excluded`, it is not touched, and fails for that reason."""

    row: int
    ref: ImageRef
    excluded: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to compute: `images` are its rows in order, `batch_size` the teacher's fixed batch. Seconds:
    `image_timeout` for reading and decoding one image, `batch_timeout` for a batch in the teacher. `kept_images` is
    the store's."""

    shard: int
    store: Path
    layouts: tuple[ArrayLayout, ...]
    image_root: Path
    images: tuple[TaskImage, ...]
    batch_size: int
    image_timeout: float
    batch_timeout: float
    kept_images: str | None = None


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of time (seconds since the epoch) that a worker spent on a phase of a shard."""

    phase: str
    start: float
    stop: float


class Stopwatch:
    """The beginning of a span, whose length the monotonic clock tells: the system's may be set meanwhile."""

    def __init__(self) -> None:
        self._start, self._began = time.time(), time.perf_counter()

    def span(self, phase: str) -> Span:
        """From the beginning until now."""
        return Span(phase=phase, start=self._start, stop=self._start + time.perf_counter() - self._began)


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """A shard written beside its place, ready to be committed. `decode_seconds` is CPU time over all images."""

    shard: int
    attempt: str
    results: tuple[RowResult, ...]
    spans: tuple[Span, ...]
    decode_seconds: float
    worker: str


@dataclass(frozen=True, kw_only=True)
class BatchDone:
    """Rows of a shard that a worker has finished computing."""

    run: str
    shard: int
    attempt: str
    rows: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class AuditTask:
    """Rows of a store to embed again, from the images that they were embedded from. Timeouts as in ShardTask."""

    store: Path
    image_root: Path
    rows: tuple[int, ...]
    image_timeout: float
    batch_timeout: float


@dataclass(frozen=True, kw_only=True)
class AuditAnswer:
    """What became of one row: its `audit`, or the `reason` why there is none."""

    row: int
    key: str
    audit: Audit | None
    reason: str | None
