"""The images that the report shows: chosen by their metrics, then looked at once more."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from ..distill import Batch, ImageMetrics, Loader, embed
from ..distill.mask_comparison import Floats, MaskComparison, grid_points
from .gallery import Specimen, pick_extremes
from .mask_pictures import PointMasks, choose_points
from .subject import Subject


def take_specimens(
    subject: Subject, per_image: Sequence[ImageMetrics], masks: MaskComparison | None
) -> tuple[list[Specimen], list[Specimen]]:
    """The worst and the best images with their embeddings and masks; `per_image`, and what `masks` has, are in the
    order of the subject's rows.

    They are computed anew: to keep every embedding until all metrics are known would take the memory of the
    whole set.
    """
    worst, best = pick_extremes([image.cosine_valid for image in per_image])
    chosen = [*worst, *best]
    records = {record.row: record for record in subject.store.records("done")}
    rows = [subject.rows[position] for position in chosen]
    specimens = []
    with (
        Loader(subject.store, [records[row] for row in rows], subject.image_root, workers=1) as loader,
        closing(loader.batches([row] for row in rows)) as batches,
    ):
        for position, batch in zip(chosen, batches, strict=True):
            key = records[batch.rows[0]].key
            student_1CHW, teacher_1CHW = _embed(subject, batch)
            shown = None if masks is None else _masks(masks, position, batch, student_1CHW, teacher_1CHW)
            specimens.append(_specimen(key, batch, student_1CHW, teacher_1CHW, per_image[position], shown))
    return specimens[: len(worst)], specimens[len(worst) :]


@torch.no_grad()
def _embed(subject: Subject, batch: Batch) -> tuple[Tensor, Tensor]:
    return embed(subject.student, batch, subject.device, subject.precision, subject.memory_format)


def _specimen(
    key: str,
    batch: Batch,
    student_1CHW: Tensor,
    teacher_1CHW: Tensor,
    metrics: ImageMetrics,
    masks: PointMasks | None,
) -> Specimen:
    height, width = batch.sizes_B2[0].tolist()
    return Specimen(
        key=key,
        photo_HWC=batch.canvas_BHWC[0, :height, :width].numpy(),
        valid_gg=batch.valid_BHW[0].numpy(),
        teacher_CHW=teacher_1CHW[0].cpu().numpy(),
        student_CHW=student_1CHW[0].cpu().numpy(),
        metrics=asdict(metrics),
        masks=masks,
    )


def _masks(
    comparison: MaskComparison, position: int, batch: Batch, student_1CHW: Tensor, teacher_1CHW: Tensor
) -> PointMasks:
    """The masks to be shown, computed anew at the size of the photo in the encoder's square."""
    height, width = batch.sizes_B2[0].tolist()
    points_N2 = grid_points(comparison.side, (height, width))
    ious_N: Floats = comparison.ious[position]
    chunks = [
        torch.stack(pair).cpu().numpy()
        for pair in comparison.masks(teacher_1CHW, student_1CHW, points_N2, (height, width), (height, width))
    ]
    teacher_NHW, student_NHW = np.concatenate(chunks, axis=1)
    chosen = choose_points(teacher_NHW)
    return PointMasks(
        points_n2=points_N2[chosen] / (width, height),
        teacher_nHW=teacher_NHW[chosen],
        student_nHW=student_NHW[chosen],
        ious_n=ious_N[chosen],
        image_iou=float(ious_N.mean()),
        compared=len(ious_N),
    )
