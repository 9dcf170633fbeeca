"""The audit in the coordinator: which rows, what it found, and what that means."""

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

from ..common.errors import PrecomputeError, shown
from ..sam import SamError
from ..store import Audit, EmbeddingStore, ImageRecord, RowResult, StoreError
from ..store.audit import tolerance
from . import sizing
from .cluster import Cluster
from .decode import LoadedImage, decoded_batches
from .messages import AuditAnswer, AuditTask, TaskImage
from .progress import Observer
from .supervision import StopAsked, Watch
from .worker import TeacherPlugin

if TYPE_CHECKING:
    from ..sam.teacher import Teacher


class Sample:
    """At most `size` of the done rows that it is shown, each with the same chance (reservoir sampling: Vitter 1985,
    algorithm R)."""

    def __init__(self, size: int) -> None:
        self.rows: list[int] = []
        self._size = size
        self._seen = 0
        self._random = random.Random()

    def show(self, results: Sequence[RowResult]) -> None:
        """Results of rows that were committed just now."""
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
    cluster: Cluster,
    plugin_name: str,
    watch: Watch,
    observer: Observer,
) -> dict[str, Any] | None:
    """Have a worker embed the rows' images again in float32; record in the store, and tell, how near the stored rows
    are. Returns `rows, cosine_min, relative_mse_max, seconds`; None without rows, or when a signal came.

    Raises PrecomputeError when it can't be done, StoreDamaged when what is stored is not what was written.
    """
    if not rows:
        return None
    began = time.monotonic()
    observer.message(f"audit: embedding {len(rows)} of this run's images again, in float32")
    task = AuditTask(
        store=store.path.absolute(),
        image_root=image_root,
        rows=tuple(sorted(rows)),
        image_timeout=image_timeout,
        batch_timeout=sizing.batch_timeout(1, None),
    )
    try:
        answers = watch.result(cluster.client.submit(audit_rows, task, plugin_name, pure=False))
    except StopAsked:
        return None
    except (SamError, StoreError, PrecomputeError):
        raise
    except Exception as error:
        what = "its workers died" if isinstance(error, KilledWorker) else f"{type(error).__name__}: {error}"
        raise PrecomputeError(
            f"the audit could not be done ({what}); every image is committed, and --audit 0 leaves it out"
        ) from error
    return _report(store, answers, time.monotonic() - began, observer)


def _report(
    store: EmbeddingStore, answers: Sequence[AuditAnswer], seconds: float, observer: Observer
) -> dict[str, Any] | None:
    for answer in answers:
        if answer.audit is None:
            observer.message(f"not audited: {answer.reason}")
    audits = [answer.audit for answer in answers if answer.audit is not None]
    if not audits:
        return None
    store.record_audits(audits)
    cosine, relative_mse = min(a.cosine for a in audits), max(a.relative_mse for a in audits)
    observer.message(
        f"audit: {len(audits)} rows, cosine at least {_floor(cosine)}, relative mse at most {relative_mse:.1e}"
    )
    return {
        "rows": len(audits),
        "cosine_min": cosine,
        "relative_mse_max": relative_mse,
        "seconds": round(seconds, 3),
    }


def warn_of_audits(store: EmbeddingStore, observer: Observer) -> bool:
    """Tell of audited rows, of this run or an earlier one, that are out of tolerance; whether there are any."""
    missed = store.audits_out_of_tolerance()
    if not missed:
        return False
    worst: Audit = max(missed, key=lambda audit: audit.relative_mse)
    allowed = tolerance(store.spec.dtype, store.spec.precision)
    (record,) = store.manifest.records(None, range(worst.row, worst.row + 1))
    observer.message(
        f"WARNING: {len(missed)} audited row(s) of {store.path} are not what {store.spec.teacher} gives, the worst: "
        f"row {worst.row}, {shown(record.key)}: cosine {_floor(worst.cosine)} (at least {allowed.cosine:g} is "
        f"expected of {store.spec.dtype} from {store.spec.precision}), relative mse {worst.relative_mse:.1e} (at "
        f"most {allowed.relative_mse:g}).\nDon't distil from this store: look for other software or a faulty "
        "device on a worker, and precompute into a new one"
    )
    return True


def _floor(cosine: float) -> str:
    return f"{math.floor(cosine * 1e6) / 1e6:.6f}"


# --- The audit on a worker: stored rows against a teacher that is loaded anew and runs in float32.
#
# It goes its own way from the image file to the embedding, so that whatever went wrong in a shard's batches, on
# the way
# to the disk or on it, shows in the numbers.
#

_TINY = 1e-30  # keeps the cosine of a zero vector at 0


def audit_rows(task: AuditTask, plugin_name: str) -> list[AuditAnswer]:
    """Embed each row's image again, and compare. Runs in a dask worker; raises what `compute_shard` does."""
    plugin: TeacherPlugin = get_worker().plugins[plugin_name]
    with EmbeddingStore.open(task.store) as store, plugin.teacher_anew() as teacher:
        records = [store.manifest.records("done", range(row, row + 1))[0] for row in task.rows]
        batches = decoded_batches(
            [_task_image(record) for record in records],
            task.image_root,
            store.spec.image_size,
            1,
            1,
            task.image_timeout,
        )
        answers = []
        with closing(batches):
            for record, batch in zip(records, batches, strict=True):
                reason = _why_not(record, batch.images[0])
                audit = None
                if reason is None:
                    with plugin.limited(task.batch_timeout):
                        fresh_CHW = plugin.compute(_embed, teacher, batch.images[0])
                    stored_CHW = store.read([record.row]).to_float32()[0]
                    audit = compare(record.row, stored_CHW, fresh_CHW)
                answers.append(AuditAnswer(row=record.row, key=record.key, audit=audit, reason=reason))
    return answers


def compare(row: int, stored_CHW: np.ndarray, fresh_CHW: np.ndarray) -> Audit:
    """How far a stored embedding (256, g, g) is from the fresh one, in float64, over all cells of the grid.

    cosine: over the channels at each cell, mean over cells. relative_mse: sum (s - t)^2 / sum (t - t_c)^2, t_c the
    fresh embedding's mean per channel. A pair that these are not defined for is as far apart as can be.
    """
    stored_CN = stored_CHW.reshape(len(stored_CHW), -1).astype(np.float64)
    fresh_CN = fresh_CHW.reshape(len(fresh_CHW), -1).astype(np.float64)
    with np.errstate(all="ignore"):
        norms_N = np.linalg.norm(stored_CN, axis=0) * np.linalg.norm(fresh_CN, axis=0)
        cosine = float(((stored_CN * fresh_CN).sum(axis=0) / np.maximum(norms_N, _TINY)).mean())
        spread = float(np.square(fresh_CN - fresh_CN.mean(axis=1, keepdims=True)).sum())
        relative_mse = float(np.square(stored_CN - fresh_CN).sum() / spread)
    if not np.isfinite([cosine, relative_mse]).all():
        # Neither JSON nor SQLite has a NaN.
        cosine, relative_mse = -1.0, sys.float_info.max
    return Audit(row=row, cosine=cosine, relative_mse=relative_mse)


def _task_image(record: ImageRecord) -> TaskImage:
    return TaskImage(row=record.row, ref=record.ref)


def _why_not(record: ImageRecord, loaded: LoadedImage) -> str | None:
    """Why there is nothing to compare: another photo's embedding says nothing about this one's."""
    if loaded.sha256 is not None and loaded.sha256 != record.sha256:
        return f"{shown(record.key)} changed during the run"
    return loaded.reason and f"{shown(record.key)}: {loaded.reason}"


def _embed(teacher: Teacher, loaded: LoadedImage) -> np.ndarray:
    from ..sam import image_pixels

    assert loaded.decoded is not None
    pixels_1CHW = image_pixels(loaded.decoded, teacher.image_size, teacher.device)
    emb_CHW: np.ndarray = teacher.embed(pixels_1CHW)[0].cpu().numpy()
    return emb_CHW
