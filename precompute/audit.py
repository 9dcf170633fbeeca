"""Audit at the end of a run: stored rows compared with a float32 teacher, in the coordinator and on a worker.

The worker embeds each image again from its file, one image at a time, with a teacher loaded only for the audit. An
error in a shard's batches, in writing or on the disk therefore shows as a difference.

Shape suffixes: C channels, H, W rows and columns of the embedding grid, L cells of the flattened grid, 1 one.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from distributed import KilledWorker, get_worker

from ..common.errors import PrecomputeError, counted, shown
from ..sam import SamError
from ..store import Audit, EmbeddingStore, ImageRecord, RowResult, StoreError, tolerance
from . import sizing
from .decode import LoadedImage, decoded_batches
from .messages import AuditResult, AuditTask, TaskImage
from .progress import Observer, begin_phase
from .supervision import ClusterMonitor, StopRequested
from .worker import TeacherPlugin

if TYPE_CHECKING:
    from ..sam.teacher import Teacher

_TINY = 1e-30  # keeps the cosine of one zero vector at 0


class ReservoirSample:
    """Random sample of at most `size` done rows, each with the same chance (Vitter 1985, algorithm R)."""

    def __init__(self, size: int) -> None:
        self.rows: list[int] = []
        self._size = size
        self._seen = 0
        self._random = random.Random()

    def add(self, results: Sequence[RowResult]) -> None:
        """Consider rows that were just committed."""
        for result in results:
            if result.reason is not None:
                continue
            self._seen += 1
            if len(self.rows) < self._size:
                self.rows.append(result.row)
            elif (place := self._random.randrange(self._seen)) < self._size:
                self.rows[place] = result.row


def run_audit(
    store: EmbeddingStore,
    rows: Sequence[int],
    image_root: Path,
    image_timeout: float,
    plugin_name: str,
    monitor: ClusterMonitor,
) -> dict[str, Any] | None:
    """Have a worker embed rows' images again in float32, and record in the store how far the stored rows differ.

    Args:
        store: store, open for writing.
        rows: numbers of done rows.
        image_root: folder that the images' keys are relative to.
        image_timeout: seconds for reading and decoding one image.
        plugin_name: name of the teacher plugin that the workers hold.
        monitor: monitor of the run's cluster.

    Returns:
        `rows` audited, `cosine_min`, `relative_mse_max`, `seconds`; None if there are no rows, no row could be
        audited, or a signal came.

    Raises:
        PrecomputeError: the audit failed, or the cluster did.
        SamError: the teacher can't be loaded.
        StoreDamaged: stored bytes are not those that were committed.
    """
    if not rows:
        return None
    began = time.monotonic()
    monitor.observer.message(f"audit: embedding {len(rows)} of this run's images again, in float32")
    begin_phase(monitor.observer, f"auditing {counted(len(rows), 'image')}")
    task = AuditTask(
        store=store.path.absolute(),
        image_root=image_root,
        rows=tuple(sorted(rows)),
        image_timeout=image_timeout,
        batch_timeout=sizing.batch_timeout(1, None),
    )
    try:
        results = monitor.result(monitor.cluster.client.submit(audit_rows, task, plugin_name, pure=False))
    except StopRequested:
        return None
    except (SamError, StoreError, PrecomputeError):
        raise
    except Exception as error:
        what = "its workers died" if isinstance(error, KilledWorker) else f"{type(error).__name__}: {error}"
        raise PrecomputeError(
            f"the audit failed ({what}); every image is committed, and --audit 0 skips the audit"
        ) from error
    return _record(store, results, time.monotonic() - began, monitor.observer)


def _record(
    store: EmbeddingStore, results: Sequence[AuditResult], seconds: float, observer: Observer
) -> dict[str, Any] | None:
    for result in results:
        if result.audit is None:
            observer.message(f"not audited: {result.reason}")
    audits = [result.audit for result in results if result.audit is not None]
    if not audits:
        return None
    store.record_audits(audits)
    cosine, relative_mse = min(a.cosine for a in audits), max(a.relative_mse for a in audits)
    observer.message(
        f"audit: {counted(len(audits), 'row')}, cosine at least {_floor(cosine)}, relative mse at "
        f"most {relative_mse:.1e}"
    )
    return {
        "rows": len(audits),
        "cosine_min": cosine,
        "relative_mse_max": relative_mse,
        "seconds": round(seconds, 3),
    }


def warn_of_audits(store: EmbeddingStore, observer: Observer) -> bool:
    """Warn of audited rows that are out of tolerance, from this run or earlier ones.

    Args:
        store: store whose audits are compared with its tolerance.
        observer: receives the warning, which names the worst row.

    Returns:
        True if there are such rows.
    """
    missed = store.audits_out_of_tolerance()
    if not missed:
        return False
    worst: Audit = max(missed, key=lambda audit: audit.relative_mse)
    allowed = tolerance(store.spec.dtype, store.spec.precision)
    (record,) = store.manifest.records(None, range(worst.row, worst.row + 1))
    observer.message(
        f"WARNING: {counted(len(missed), 'audited row')} of {store.path} "
        f"{'differs' if len(missed) == 1 else 'differ'} from what {store.spec.teacher} computes; the "
        f"worst is row {worst.row}, {shown(record.key)}: cosine {_floor(worst.cosine)} (expected for "
        f"{store.spec.dtype} from {store.spec.precision}: at least {allowed.cosine:g}), relative mse "
        f"{worst.relative_mse:.1e} (at most {allowed.relative_mse:g}).\nDon't distil from this store: look for a "
        "worker with other software or a faulty device, and precompute a new store"
    )
    return True


def _floor(cosine: float) -> str:
    return f"{math.floor(cosine * 1e6) / 1e6:.6f}"


def audit_rows(task: AuditTask, plugin_name: str) -> list[AuditResult]:
    """Embed each row's image again in float32, and compare. Runs in a dask worker.

    Args:
        task: rows to audit.
        plugin_name: name of the `TeacherPlugin` that the worker holds.

    Returns:
        One result for each row, in order.

    Raises:
        StoreError: the store can't be read, or is damaged.
        SamError: the teacher can't be loaded.
        PrecomputeError: the worker has another checkpoint, or its disk hangs.
    """
    plugin: TeacherPlugin = get_worker().plugins[plugin_name]
    with EmbeddingStore.open(task.store) as store, plugin.float32_teacher() as teacher:
        records = [store.manifest.records("done", range(row, row + 1))[0] for row in task.rows]
        images = [TaskImage(row=record.row, ref=record.ref) for record in records]
        batches = decoded_batches(images, task.image_root, store.spec.image_size, 1, 1, task.image_timeout)
        results = []
        with closing(batches):
            for record, batch in zip(records, batches, strict=True):
                (loaded,) = batch.images
                audit, reason = None, _reason_not_audited(record, loaded)
                if reason is None:
                    with plugin.time_limit(task.batch_timeout):
                        fresh_CHW = plugin.compute(_embed, teacher, loaded)
                    stored_CHW = store.read([record.row]).to_float32()[0]
                    audit = compare(record.row, stored_CHW, fresh_CHW)
                results.append(AuditResult(row=record.row, key=record.key, audit=audit, reason=reason))
    return results


def _reason_not_audited(record: ImageRecord, loaded: LoadedImage) -> str | None:
    """Return the reason if a row can't be audited, else None. An image that changed since has another embedding."""
    result = loaded.result
    if result.sha256 is not None and result.sha256 != record.sha256:
        return f"{shown(record.key)} changed during the run"
    return result.reason and f"{shown(record.key)}: {result.reason}"


def _embed(teacher: Teacher, loaded: LoadedImage) -> np.ndarray:
    from ..sam import image_pixels

    assert loaded.decoded is not None
    pixels_1CHW = image_pixels(loaded.decoded, teacher.image_size, teacher.device)
    emb_CHW: np.ndarray = teacher.embed(pixels_1CHW)[0].cpu().numpy()
    return emb_CHW


def compare(row: int, stored_CHW: np.ndarray, fresh_CHW: np.ndarray) -> Audit:
    """Compare a stored embedding with a fresh one, in float64, over all cells of the grid.

    Args:
        row: number of the row.
        stored_CHW: (256, g, g), any floating dtype.
        fresh_CHW: (256, g, g), any floating dtype.

    Returns:
        `cosine`: over the channels at each cell, 1 where both are zero vectors, mean over cells. `relative_mse`:
        sum (s - t)^2 / sum (t - t_c)^2, with s the stored and t the fresh embedding, and t_c the latter's mean per
        channel. If either is undefined, -1 and the largest float, since neither JSON nor SQLite has a NaN.
    """
    stored_CL = stored_CHW.reshape(len(stored_CHW), -1).astype(np.float64)
    fresh_CL = fresh_CHW.reshape(len(fresh_CHW), -1).astype(np.float64)
    with np.errstate(all="ignore"):
        norms_L = np.linalg.norm(stored_CL, axis=0) * np.linalg.norm(fresh_CL, axis=0)
        cosine_L = (stored_CL * fresh_CL).sum(axis=0) / np.maximum(norms_L, _TINY)
        cosine_L[~(stored_CL.any(axis=0) | fresh_CL.any(axis=0))] = (
            1  # such as the padding, for some teachers
        )
        cosine = float(cosine_L.mean())
        spread = float(np.square(fresh_CL - fresh_CL.mean(axis=1, keepdims=True)).sum())
        relative_mse = float(np.square(stored_CL - fresh_CL).sum() / spread)
    if not np.isfinite([cosine, relative_mse]).all():
        cosine, relative_mse = -1.0, sys.float_info.max
    return Audit(row=row, cosine=cosine, relative_mse=relative_mse)
