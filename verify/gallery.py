"""Gallery of the worst and the best images of a verification: panels of pictures for the report.

Shape suffixes: C channels, H and W rows and columns, g side of the embedding's grid, P prompts of one point each, p
some of them, 1 one image, 2 (x, y).
"""

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
from .inputs import Inputs
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


def worst_and_best(scores: Sequence[float | None], count: int = 6) -> tuple[list[int], list[int]]:
    """Return the indices of the lowest and of the highest scores, the most extreme first; no index is in both lists.

    Args:
        scores: scores of images; an undefined score (None or NaN) is in neither list.
        count: largest length of each list. If there are fewer than 2 * `count` scores, the lower half (rounded up)
            and the upper half are returned.
    """
    defined = [i for i, score in enumerate(scores) if score is not None and score == score]
    ranked = sorted(defined, key=lambda i: (scores[i], i))
    worst = ranked[: min(count, (len(ranked) + 1) // 2)]
    best = ranked[len(ranked) - min(count, len(ranked) // 2) :][::-1]
    return worst, best


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with its embeddings by teacher and student."""

    key: str
    """The image's key in the store."""
    photo_HWC: npt.NDArray[np.uint8]
    """uint8 RGB (H, W, 3), the image in the encoder's square, without padding."""
    valid_gg: npt.NDArray[np.bool_]
    """bool (g, g), True for cells whose centre lies in the image."""
    teacher_CHW: npt.NDArray[np.floating]
    """float32 (256, g, g)."""
    student_CHW: npt.NDArray[np.floating]
    """float32 (256, g, g)."""
    metrics: Mapping[str, Any]
    """`cosine`, `cosine_valid`, `mse`, `mse_valid` of this image."""
    masks: PointMasks | None = None
    """Masks of some points; None if masks weren't compared."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One sample as data URIs and numbers."""

    name: str
    size: tuple[int, int]
    """Height and width of the photo in pixels."""
    pictures: Mapping[str, str]
    """Data URIs of `photo`, `teacher`, `student` (embeddings as colours) and `error`."""
    metrics: Mapping[str, float]
    error_max: float
    """Largest 1 - cosine over the valid cells."""
    masks: MaskPanel | None


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Panels that share one set of colours and one error scale."""

    worst: list[Panel]
    best: list[Panel]
    explained: float
    """Share of the teacher's variance that the colours show, 0 to 1."""
    error_top: float
    """Upper end of the error scale, as 1 - cosine."""
    error_bar: str
    """Colour bar of the error scale from 0 to `error_top`: data URI of a picture one pixel high."""


def build_gallery(worst: Sequence[Sample], best: Sequence[Sample]) -> Gallery | None:
    """Fit the colours and the error scale to all samples, and paint their panels.

    Args:
        worst: samples of the worst images, the worst first.
        best: samples of the best images, the best first.

    Returns:
        The gallery; None without samples.
    """
    samples = [*worst, *best]
    if not samples:
        return None
    colours = EmbeddingColours.fit((s.teacher_CHW, s.valid_gg) for s in samples)
    errors = [cosine_distance(s.student_CHW, s.teacher_CHW, s.valid_gg) for s in samples]
    top = common_scale(errors)
    panels = [_panel(s, error_HW, colours, top) for s, error_HW in zip(samples, errors, strict=True)]
    return Gallery(
        worst=panels[: len(worst)],
        best=panels[len(worst) :],
        explained=colours.explained,
        error_top=top,
        error_bar=png_uri(paint_error(np.linspace(0, 1, 128)[None] ** 2, 1.0)),
    )


def _panel(s: Sample, error_HW: npt.NDArray[np.floating], colours: EmbeddingColours, top: float) -> Panel:
    height, width = s.photo_HWC.shape[:2]
    return Panel(
        name=s.key,
        size=(height, width),
        pictures={
            "photo": thumbnail_uri(s.photo_HWC),
            "teacher": png_uri(colours.paint(s.teacher_CHW, s.valid_gg)),
            "student": png_uri(colours.paint(s.student_CHW, s.valid_gg)),
            "error": png_uri(paint_error(error_HW, top)),
        },
        metrics=s.metrics,
        error_max=float(error_HW.max()),
        masks=None if s.masks is None else mask_panel(s.photo_HWC, s.masks),
    )


def load_samples(
    inputs: Inputs, per_image: Sequence[ImageMetrics], masks: MaskComparison | None
) -> tuple[list[Sample], list[Sample]]:
    """Return the worst and the best images, by their cosine over valid cells, with their embeddings and masks.

    Embeddings and masks are computed again, since keeping those of all images would take too much memory.

    Args:
        inputs: inputs of the verification, still open.
        per_image: metrics of each image, in the order of the inputs' rows.
        masks: comparison of the masks of all rows, in the same order; None leaves masks out.
    """
    worst, best = worst_and_best([image.cosine_valid for image in per_image])
    chosen = [*worst, *best]
    records = {record.row: record for record in inputs.store.manifest.records("done")}
    rows = [inputs.rows[position] for position in chosen]
    samples = []
    with (
        Loader(
            inputs.store,
            [records[row] for row in rows],
            inputs.image_root,
            workers=1,
            student_size=inputs.student.info["student_size"],
        ) as loader,
        closing(loader.batches([row] for row in rows)) as batches,
    ):
        for position, batch in zip(chosen, batches, strict=True):
            student_1CHW, teacher_1CHW = _embed(inputs, batch)
            height, width = batch.sizes_B2[0].tolist()
            seen_height, seen_width = batch.canvas_sizes_B2[0].tolist()
            samples.append(
                Sample(
                    key=records[batch.rows[0]].key,
                    photo_HWC=batch.canvas_BHWC[0, :seen_height, :seen_width].numpy(),
                    valid_gg=batch.valid_BHW[0].numpy(),
                    teacher_CHW=teacher_1CHW[0].cpu().numpy(),
                    student_CHW=student_1CHW[0].cpu().numpy(),
                    metrics=asdict(per_image[position]),
                    masks=None
                    if masks is None
                    else _masks(masks, position, (height, width), student_1CHW, teacher_1CHW),
                )
            )
    return samples[: len(worst)], samples[len(worst) :]


@torch.no_grad()
def _embed(inputs: Inputs, batch: Batch) -> tuple[Tensor, Tensor]:
    return embed(inputs.student.encoder, batch, inputs.compute)


def _masks(
    comparison: MaskComparison,
    position: int,
    size: tuple[int, int],
    student_1CHW: Tensor,
    teacher_1CHW: Tensor,
) -> PointMasks:
    """Compute the masks to show, at the size of the photo in the encoder's square."""
    height, width = size
    points_P2 = grid_points(comparison.points_per_side, size)
    ious_P: Floats = comparison.ious[position]
    chunks = [
        torch.stack(pair).cpu().numpy()
        for pair in comparison.masks(teacher_1CHW, student_1CHW, points_P2, size, size)
    ]
    teacher_PHW, student_PHW = np.concatenate(chunks, axis=1)
    chosen = choose_points(teacher_PHW)
    return PointMasks(
        points_p2=points_P2[chosen] / (width, height),
        teacher_pHW=teacher_PHW[chosen],
        student_pHW=student_PHW[chosen],
        ious_p=ious_P[chosen],
        image_iou=float(ious_P.mean()),
        compared=len(ious_P),
    )
