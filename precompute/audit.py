"""The audit on a worker: stored rows against a teacher that is loaded anew and runs in float32.

It goes its own way from the image file to the embedding, so that whatever went wrong in a shard's batches, on the way
to the disk or on it, shows in the numbers.
"""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
from distributed import get_worker

from ..sam import shown
from ..store import Audit, EmbeddingStore, ImageRecord
from .decoding import LoadedImage, decoded_batches
from .tasks import AuditAnswer, AuditTask, TaskImage
from .worker import TeacherPlugin

if TYPE_CHECKING:
    from ..sam.teachers import Teacher

_TINY = 1e-30  # keeps the cosine of a zero vector at 0


def audit_rows(task: AuditTask, plugin_name: str) -> list[AuditAnswer]:
    """Embed each row's image again, and compare. Runs in a dask worker; raises what `compute_shard` does."""
    plugin: TeacherPlugin = get_worker().plugins[plugin_name]
    with EmbeddingStore.open(task.store) as store, plugin.teacher_anew() as teacher:
        records = [store.records("done", range(row, row + 1))[0] for row in task.rows]
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
    return TaskImage(row=record.row, key=record.key, size=record.size, offset=record.offset)


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
