"""The images that the report shows: chosen by their metrics, then looked at once more."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict

import torch

from ..distill import Batch, ImageMetrics, Loader, embed
from .gallery import Specimen, pick_extremes
from .subject import Subject


def take_specimens(
    subject: Subject, per_image: Sequence[ImageMetrics]
) -> tuple[list[Specimen], list[Specimen]]:
    """The worst and the best images with their embeddings; `per_image` is in the order of the subject's rows.

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
            specimens.append(_specimen(subject, key, batch, per_image[position]))
    return specimens[: len(worst)], specimens[len(worst) :]


@torch.no_grad()
def _specimen(subject: Subject, key: str, batch: Batch, metrics: ImageMetrics) -> Specimen:
    student_BCHW, teacher_BCHW = embed(subject.student, batch, subject.device, subject.precision)
    height, width = batch.sizes_B2[0].tolist()
    return Specimen(
        key=key,
        photo_HWC=batch.canvas_BHWC[0, :height, :width].numpy(),
        valid_gg=batch.valid_BHW[0].numpy(),
        teacher_CHW=teacher_BCHW[0].cpu().numpy(),
        student_CHW=student_BCHW[0].cpu().numpy(),
        metrics=asdict(metrics),
    )
