"""Embeddings as colours, their error as a map, and pictures as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]
Rgb = npt.NDArray[np.uint8]


def crop_to_valid(grid: npt.NDArray, valid_gg: Bools) -> npt.NDArray:
    """The image's part of `grid` (..., g, g): padding is right and below, so it is a top-left rectangle.

    At least one cell is kept: an image thinner than half a cell has no valid one.
    """
    rows = max(1, int(valid_gg.any(axis=1).sum()))
    columns = max(1, int(valid_gg.any(axis=0).sum()))
    return grid[..., :rows, :columns]


@dataclass(frozen=True, kw_only=True)
class EmbeddingColours:
    """A fixed map from an embedding's C channels to red, green and blue.

    Fitted on the teacher and used for teacher and student alike: equal embeddings get equal colours, and a
    student that drifts away shows other colours instead of being rescaled into the same ones.
    """

    mean_C: Floats
    components_3C: Floats
    """Orthonormal rows by falling variance; each one's largest loading is positive, which fixes its sign."""
    low_3: Floats
    high_3: Floats
    """The projections that become 0 and 255: the teacher's 1st and 99th percentile of each component."""
    explained: float
    """The share of the teacher's variance that the three components hold, 0 to 1."""

    @classmethod
    def fit(cls, teachers: Iterable[tuple[Floats, Bools]]) -> EmbeddingColours:
        """Principal components over the valid cells of `teachers`: pairs of emb_CHW and valid_gg."""
        cells_NC = np.concatenate([_cells(emb_CHW, valid_gg) for emb_CHW, valid_gg in teachers])
        mean_C = cells_NC.mean(axis=0)
        centred_NC = cells_NC - mean_C
        variances_C, vectors_CC = np.linalg.eigh(centred_NC.T @ centred_NC / len(cells_NC))
        variances_C = variances_C.clip(min=0)  # eigh may give -1e-18 for a zero
        components_3C = vectors_CC[:, ::-1][:, :3].T
        largest_3 = np.abs(components_3C).argmax(axis=1)
        components_3C = components_3C * np.sign(components_3C[np.arange(len(largest_3)), largest_3])[:, None]
        low_3, high_3 = np.percentile(centred_NC @ components_3C.T, [1, 99], axis=0)
        total = float(variances_C.sum())
        return cls(
            mean_C=mean_C,
            components_3C=components_3C,
            low_3=low_3,
            high_3=high_3,
            explained=float(variances_C[-3:].sum()) / total if total > 0 else 0.0,
        )

    def paint(self, emb_CHW: Floats, valid_gg: Bools) -> Rgb:
        """The valid cells of one embedding as an image, uint8 (rows, columns, 3), one pixel a cell."""
        emb_CHW = crop_to_valid(emb_CHW, valid_gg).astype(np.float64)
        projected_HW3 = (emb_CHW.transpose(1, 2, 0) - self.mean_C) @ self.components_3C.T
        span_3 = self.high_3 - self.low_3
        flat_3 = span_3 <= 1e-12  # a teacher without variance: mid-grey rather than noise blown up to colours
        unit_HW3 = np.where(flat_3, 0.5, (projected_HW3 - self.low_3) / np.where(flat_3, 1.0, span_3))
        return np.rint(unit_HW3.clip(0, 1) * 255).astype(np.uint8)


def _cells(emb_CHW: Floats, valid_gg: Bools) -> Floats:
    """The cells of an image as rows (n, C), float64."""
    cropped_CHW = crop_to_valid(emb_CHW, valid_gg)
    return cropped_CHW.reshape(cropped_CHW.shape[0], -1).T.astype(np.float64)


def cosine_distance(student_CHW: Floats, teacher_CHW: Floats, valid_gg: Bools) -> Floats:
    """1 - cosine over the channels of every valid cell, float64 (rows, columns), 0 to 2."""
    student_CHW = crop_to_valid(student_CHW, valid_gg).astype(np.float64)
    teacher_CHW = crop_to_valid(teacher_CHW, valid_gg).astype(np.float64)
    norms = np.linalg.norm(student_CHW, axis=0) * np.linalg.norm(teacher_CHW, axis=0)
    return 1.0 - (student_CHW * teacher_CHW).sum(axis=0) / np.maximum(norms, 1e-12)


def common_scale(errors: Iterable[Floats]) -> float:
    """The error at which the colours of all maps end: a round number above 99% of all cells, 0.001 at least.

    The floor keeps the rounding noise of a perfect student from filling the scale.
    """
    top = float(np.percentile(np.concatenate([error.ravel() for error in errors]), 99))
    if top <= 0.001:
        return 0.001
    unit = 10.0 ** np.floor(np.log10(top))
    step = next(step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 20) if step * unit >= top)
    return float(f"{step * unit:.12g}")


def paint_error(error_HW: Floats, top: float) -> Rgb:
    """An error map as colours (matplotlib's magma), uint8 (rows, columns, 3); `top` and above are lightest.

    Colours follow the square root of the error: half-way up the colours lies `top` / 4. On a linear scale that
    holds the worst images, the best ones are plain black.
    """
    from matplotlib import colormaps

    rgba_HW4 = colormaps["magma"](np.sqrt(np.clip(error_HW / top, 0, 1)), bytes=True)
    return np.ascontiguousarray(rgba_HW4[..., :3])


def png_uri(rgb_HW3: Rgb) -> str:
    """A picture as a lossless data URI."""
    return _uri(Image.fromarray(rgb_HW3), "png", optimize=True)


def thumbnail_uri(rgb_HW3: Rgb, longest: int = 440) -> str:
    """A photo as a JPEG data URI, its longest side at most `longest` pixels."""
    image = Image.fromarray(rgb_HW3)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _uri(image, "jpeg", quality=82, optimize=True, progressive=True)


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
