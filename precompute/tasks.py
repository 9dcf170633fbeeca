"""What travels between coordinator and workers: row numbers and keys out, records back; never arrays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..store import ArrayLayout, RowResult

BATCH_TOPIC = "mobilesam-batch"
"""Topic of the events by which workers report rows as they finish, before their shard is committed."""


@dataclass(frozen=True, kw_only=True)
class TeacherSetup:
    """How a worker makes its teacher: on one of the `devices`, with `threads` for torch on a CPU and for decoding
    (None: as many as the worker has)."""

    name: str
    checkpoint: Path | None
    checkpoint_sha256: str
    image_size: int
    precision: str
    devices: tuple[str, ...]
    threads: int | None


@dataclass(frozen=True, kw_only=True)
class TaskImage:
    """One image of a shard. With `excluded`, it is not touched, and fails for that reason."""

    row: int
    key: str
    size: int
    offset: int | None
    excluded: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to compute: `images` are its rows in order, `batch_size` the teacher's fixed batch."""

    shard: int
    store: Path
    layouts: tuple[ArrayLayout, ...]
    image_root: Path
    images: tuple[TaskImage, ...]
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of time (seconds since the epoch) that a worker spent on a phase of a shard."""

    phase: str
    start: float
    stop: float


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
