"""Messages between coordinator and workers: row numbers and keys out, records and numbers back, never arrays.

A dask task begins in one of three functions, with one of the tasks of this module:

- `shard.compute_shard(ShardTask)`: compute one shard; `scheduler.py` submits it and commits the `ShardResult`.
- `shard.probe(ShardTask)`: find out whether images kill the worker; `supervision.py` submits it.
- `audit.audit_rows(AuditTask)`: embed stored rows again; `audit.run_audit` submits it.

An image is an `ImageRef` in the listing and the manifest, a `TaskImage` on its way to the worker, a
`decode.LoadedImage` there, and a `RowResult` (store/records.py) on its way back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ..common.image_ref import ImageRef
from ..store import PIXELS_PER_CELL, ArrayLayout, Audit, RowResult

BATCH_TOPIC = "mobilesam-batch"
"""Topic of the events by which workers report computed rows before their shard is committed."""

MESSAGE_TOPIC = "mobilesam-message"
"""Topic of the events by which workers send one-line messages for the user."""


@dataclass(frozen=True, kw_only=True)
class TeacherSetup:
    """Description from which each worker loads its teacher."""

    name: str
    checkpoint: Path | None
    """None for the embedded teacher."""
    checkpoint_sha256: str
    image_size: int
    """Side of the padded square, in pixels."""
    precision: str
    """float32 or bfloat16."""
    compiled_batch: int | None
    """Batch size that torch.compile compiles the teacher for; None for an eager teacher."""
    devices: tuple[str, ...]
    """Devices that the workers take in turn."""
    threads: int | None
    """Threads for torch on a CPU and for decoding; None for as many as the worker has."""
    local: bool
    """The workers are children of the coordinator and must die with it."""


@dataclass(frozen=True, kw_only=True)
class TaskImage:
    """One image of a shard. With `excluded`, it is not read, and fails for that reason."""

    row: int
    ref: ImageRef
    excluded: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to compute."""

    shard: int
    store: Path
    layouts: tuple[ArrayLayout, ...]
    image_root: Path
    images: tuple[TaskImage, ...]
    """The shard's rows in order."""
    batch_size: int
    """Images of every batch that the teacher computes; a short batch is padded to it."""
    image_timeout: float
    """Seconds for reading and decoding one image."""
    batch_timeout: float
    """Seconds for one batch in the teacher."""
    kept_images: str | None = None
    """Kind of the image files that the store keeps; None if it keeps none."""

    @property
    def image_size(self) -> int:
        """Side of the teacher's padded square, in pixels."""
        return self.layouts[0].item_shape[-1] * PIXELS_PER_CELL


@dataclass(frozen=True, kw_only=True)
class Span:
    """Time that a worker spent on a phase of a shard ("decode", "teacher" or "write"), in seconds since the epoch."""

    phase: str
    start: float
    stop: float


class Stopwatch:
    """Start of a span. Its length comes from the monotonic clock, since the system clock may be set during it."""

    def __init__(self) -> None:
        self._start, self._began = time.time(), time.perf_counter()

    def span(self, phase: str) -> Span:
        """Return the span from the start until now."""
        return Span(phase=phase, start=self._start, stop=self._start + time.perf_counter() - self._began)


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """A shard whose partial files are written, ready to be committed."""

    shard: int
    attempt: str
    """Part of the partial files' names, unique to this attempt."""
    results: tuple[RowResult, ...]
    """One for each row of the shard, in order."""
    spans: tuple[Span, ...]
    decode_seconds: float
    """CPU time of reading and decoding, over all images."""
    worker: str
    """Address of the worker."""


@dataclass(frozen=True, kw_only=True)
class BatchDone:
    """Event: a worker has computed `rows` rows of a shard, `failed` of them without an embedding."""

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
class AuditResult:
    """Outcome for one audited row: its `audit`, or the `reason` why there is none."""

    row: int
    key: str
    audit: Audit | None
    reason: str | None
