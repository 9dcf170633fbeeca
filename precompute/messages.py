"""Messages between coordinator and workers: row numbers and keys out, records and numbers back, never arrays.

A dask task calls one of three functions, with one of this module's tasks:

- `shard.compute_shard(ShardTask)`: compute one shard; `scheduler.py` submits it and commits the `ShardResult`.
- `shard.probe(ShardTask)`: test if images kill the worker; `supervision.py` submits it.
- `audit.audit_rows(AuditTask)`: embed stored rows again; `audit.run_audit` submits it.

An image is an `ImageRef` in the listing and the manifest, a `TaskImage` on its way to the worker, a
`decode.LoadedImage` there, and a `RowResult` (store/records.py) on its way back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ..common.image_ref import ImageRef
from ..sam.registry import TeacherPackage
from ..store import PIXELS_PER_CELL, ArrayLayout, Audit, RowResult

BATCH_TOPIC = "mobilesam-batch"
"""Topic of the events in which workers report computed rows before their shard is committed."""

MESSAGE_TOPIC = "mobilesam-message"
"""Topic of the events in which workers send one-line messages for the user."""


@dataclass(frozen=True, kw_only=True)
class TeacherSetup:
    """Description of the teacher that each worker loads."""

    name: str
    checkpoint: Path | None
    """None for a teacher whose weights are in its package."""
    checkpoint_sha256: str
    image_size: int
    """Side of the padded square, in pixels."""
    precision: str
    """float32 or bfloat16."""
    batch_size: int
    """Images of every batch."""
    compile: bool
    """True if torch.compile compiles the teacher, for that batch size."""
    devices: tuple[str, ...]
    """Devices that the workers take in turn."""
    threads: int | None
    """Threads for torch on a CPU and for decoding; None for as many as the worker has."""
    package: TeacherPackage | None = None
    """Package that the coordinator's teacher comes from, which every worker must have too; None for mobilesam's."""
    local: bool
    """True if the workers are children of the coordinator and must die with it."""


@dataclass(frozen=True, kw_only=True)
class TaskImage:
    """One image of a shard."""

    row: int
    ref: ImageRef
    excluded: str | None = None
    """Reason for which the image fails without being read; None to read it."""


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to compute."""

    shard: int
    store: Path
    layouts: tuple[ArrayLayout, ...]
    image_root: Path
    """Folder that the images' keys are relative to, the same on every machine."""
    images: tuple[TaskImage, ...]
    """Images of the shard's rows, in order."""
    batch_size: int
    """Images of every batch that the teacher computes; a short batch is padded to it."""
    image_timeout: float
    """Seconds for reading and decoding one image."""
    batch_timeout: float
    """Seconds for one batch in the teacher."""
    kept_images: str | None = None
    """File type of the images that the store keeps; None if it keeps none."""

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
    """Stopwatch for spans. It measures by the monotonic clock, since the system clock may be set meanwhile."""

    def __init__(self) -> None:
        self._start, self._began = time.time(), time.perf_counter()

    def span(self, phase: str, seconds: float | None = None) -> Span:
        """Return the span from the start until now, or the last `seconds` of it."""
        stop = self._start + time.perf_counter() - self._began
        start = self._start if seconds is None else stop - seconds
        return Span(phase=phase, start=start, stop=stop)


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """Result of a shard whose partial files are complete and can be committed."""

    shard: int
    attempt: str
    """Name of the attempt, which is part of the partial files' names."""
    results: tuple[RowResult, ...]
    """One for each row of the shard, in order."""
    spans: tuple[Span, ...]
    decode_seconds: float
    """CPU seconds of reading and decoding all images."""
    worker: str
    """Address of the worker."""


@dataclass(frozen=True, kw_only=True)
class BatchDone:
    """Event: a worker has computed `rows` rows of a shard, `failed` of them without an embedding."""

    run: str
    """Identifier of the precompute run."""
    shard: int
    attempt: str
    rows: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class AuditTask:
    """Rows of a store whose images are embedded again. Root and timeouts are as in `ShardTask`."""

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
