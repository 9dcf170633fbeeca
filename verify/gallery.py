"""The worst and the best images of a comparison, as panels of pictures for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..distill import Batch, ImageMetrics, Loader, embed
from ..distill.metrics.masks import Floats, MaskComparison, grid_points
from .inputs import Subject
from .rendering.images import (
    EmbeddingColours,
    MaskPanel,
    PointMasks,
    choose_points,
    common_scale,
    cosine_distance,
    mask_panel,
    paint_error,
    png_uri,
    thumbnail_uri,
)


def pick_extremes(cosines: Sequence[float | None], count: int = 6) -> tuple[list[int], list[int]]:
    """Positions of the worst and of the best images, the most extreme first; no image is in both.

    Of few images the worst half (rounded up) and the best half are shown. An image without a cosine (None or
    NaN: it has no valid cell) is in neither.
    """
    defined = [i for i, cosine in enumerate(cosines) if cosine is not None and cosine == cosine]
    ranked = sorted(defined, key=lambda i: (cosines[i], i))
    worst = ranked[: min(count, (len(ranked) + 1) // 2)]
    best = ranked[len(ranked) - min(count, len(ranked) // 2) :][::-1]
    return worst, best


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """One image with what teacher and student say about it."""

    key: str
    photo_HWC: npt.NDArray[np.uint8]
    """The photo without padding, at the size the encoders see."""
    valid_gg: npt.NDArray[np.bool_]
    teacher_CHW: npt.NDArray[np.floating]
    student_CHW: npt.NDArray[np.floating]
    metrics: Mapping[str, Any]
    """cosine, cosine_valid, mse, mse_valid of this image."""
    masks: PointMasks | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A specimen as data URIs and numbers."""

    name: str
    width: int
    height: int
    photo: str
    teacher: str
    student: str
    error: str
    cosine: float
    cosine_valid: float
    mse: float
    mse_valid: float
    error_max: float
    masks: MaskPanel | None


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Panels that share one set of colours and one error scale."""

    worst: list[Panel]
    best: list[Panel]
    explained: float
    error_top: float
    error_bar: str
    """The error scale's colours from 0 to `error_top`, as a data URI of a one pixel high picture."""


def build_gallery(worst: Sequence[Specimen], best: Sequence[Specimen]) -> Gallery | None:
    """Colours and error scale fitted on all of `worst` and `best`, then their panels; None without any."""
    specimens = [*worst, *best]
    if not specimens:
        return None
    colours = EmbeddingColours.fit((s.teacher_CHW, s.valid_gg) for s in specimens)
    errors = [cosine_distance(s.student_CHW, s.teacher_CHW, s.valid_gg) for s in specimens]
    top = common_scale(errors)
    panels = [_panel(s, error, colours, top) for s, error in zip(specimens, errors, strict=True)]
    return Gallery(
        worst=panels[: len(worst)],
        best=panels[len(worst) :],
        explained=colours.explained,
        error_top=top,
        error_bar=png_uri(paint_error(np.linspace(0, 1, 128)[None] ** 2, 1.0)),
    )


def _panel(s: Specimen, error_HW: npt.NDArray[np.floating], colours: EmbeddingColours, top: float) -> Panel:
    height, width = s.photo_HWC.shape[:2]
    return Panel(
        name=s.key,
        width=width,
        height=height,
        photo=thumbnail_uri(s.photo_HWC),
        teacher=png_uri(colours.paint(s.teacher_CHW, s.valid_gg)),
        student=png_uri(colours.paint(s.student_CHW, s.valid_gg)),
        error=png_uri(paint_error(error_HW, top)),
        error_max=float(error_HW.max()),
        masks=None if s.masks is None else mask_panel(s.photo_HWC, s.masks),
        **{name: s.metrics[name] for name in ("cosine", "cosine_valid", "mse", "mse_valid")},
    )


# --- The images that the report shows: chosen by their metrics, then looked at once more.


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
    records = {record.row: record for record in subject.store.manifest.records("done")}
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
    return embed(subject.student, batch, subject.compute)


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
