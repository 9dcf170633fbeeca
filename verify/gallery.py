"""The worst and the best images of a comparison, as panels of pictures for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .mask_pictures import MaskPanel, PointMasks, mask_panel
from .pictures import (
    EmbeddingColours,
    common_scale,
    cosine_distance,
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
