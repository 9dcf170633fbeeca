"""Embeddings as colours, their error as a map, and pictures as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from ...distill.metrics.masks import iou

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


# --- What teacher and student say to the same points of one image, as pictures.

COLOURS = ((255, 176, 0), (0, 200, 255), (255, 64, 160), (130, 255, 80))
"""Of an image's first, second, ... point: apart from each other for colour-blind eyes too, and rare in photos."""

LONGEST = 440
"""Side in pixels of the pictures, as of the other photos."""

LEAST_SHARE, MOST_SHARE = 0.001, 0.95
"""Of the image: a mask with less or more of it says little about what was segmented."""

ALIKE = 0.5
"""The IoU from which on two masks show the same."""


@dataclass(frozen=True, kw_only=True)
class PointMasks:
    """The masks of one image for n of its points, at the size of its photo in the encoder's square."""

    points_n2: Floats
    """x and y, 0 to 1: shares of the photo's width and height."""
    teacher_nHW: Bools
    student_nHW: Bools
    ious_n: Floats
    """At the image's original size, as verify counts them."""
    image_iou: float
    """The mean over all points that were compared, not only these."""
    compared: int
    """How many those are."""


@dataclass(frozen=True, kw_only=True)
class MaskPanel:
    """PointMasks as data URIs and numbers."""

    teacher: str
    student: str
    points: list[tuple[str, float]]
    """The colour of each point, for CSS, and its IoU."""
    image_iou: float
    compared: int


def choose_points(masks_NHW: Bools, most: int = 4) -> list[int]:
    """Positions of up to `most` masks that differ from each other (IoU below ALIKE), in order.

    Masks of next to nothing or of almost everything are taken only when there is no other.
    """
    shares_N = masks_NHW.mean(axis=(1, 2))
    telling_N = (shares_N >= LEAST_SHARE) & (shares_N <= MOST_SHARE)
    return _differing(masks_NHW, np.flatnonzero(telling_N), most) or _differing(
        masks_NHW, range(len(masks_NHW)), most
    )


def _differing(masks_NHW: Bools, candidates: Iterable[int], most: int) -> list[int]:
    chosen: list[int] = []
    for candidate in map(int, candidates):
        if len(chosen) == most:
            break
        earlier_nHW = masks_NHW[chosen]
        shared_n = (earlier_nHW & masks_NHW[candidate]).sum(axis=(1, 2))
        either_n = (earlier_nHW | masks_NHW[candidate]).sum(axis=(1, 2))
        if bool((iou(shared_n, either_n) < ALIKE).all()):
            chosen.append(candidate)
    return chosen


def mask_panel(photo_HWC: Rgb, masks: PointMasks) -> MaskPanel:
    """Both pictures, with the same colour for the same point."""
    return MaskPanel(
        teacher=thumbnail_uri(paint_masks(photo_HWC, masks.teacher_nHW, masks.points_n2), LONGEST),
        student=thumbnail_uri(paint_masks(photo_HWC, masks.student_nHW, masks.points_n2), LONGEST),
        points=[(f"rgb{colour}", float(value)) for colour, value in zip(COLOURS, masks.ious_n, strict=False)],
        image_iou=masks.image_iou,
        compared=masks.compared,
    )


def paint_masks(photo_HWC: Rgb, masks_nHW: Bools, points_n2: Floats, longest: int = LONGEST) -> Rgb:
    """The photo, its longest side at most `longest` pixels, with its masks: translucent, outlined, points as dots.

    The photo is paled first, so that no colour of its own passes for a mask's.
    """
    image = Image.fromarray(photo_HWC)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    picture_HWC = _paled(np.asarray(image))
    colours = [np.array(colour, dtype=np.float32) for colour in COLOURS[: len(masks_nHW)]]
    small_nHW = [_shrunk(mask_HW, image.size) for mask_HW in masks_nHW]
    # Large ones first, so that small ones lie on top.
    for i in sorted(range(len(small_nHW)), key=lambda i: -int(small_nHW[i].sum())):
        picture_HWC[small_nHW[i]] = 0.5 * picture_HWC[small_nHW[i]] + 0.5 * colours[i]
    for colour, mask_HW in zip(colours, small_nHW, strict=True):
        picture_HWC[_outline(mask_HW)] = colour
    painted = Image.fromarray(np.rint(picture_HWC).astype(np.uint8))
    _dot(painted, points_n2)
    return np.asarray(painted)


def _paled(photo_HWC: Rgb) -> npt.NDArray[np.float32]:
    grey_HW1 = photo_HWC.astype(np.float32).mean(axis=-1, keepdims=True)
    return 0.35 * photo_HWC + 0.65 * grey_HW1


def _shrunk(mask_HW: Bools, size: tuple[int, int]) -> Bools:
    """The mask at `size` (width, height): pixels of which at least half are in it."""
    small = Image.fromarray(mask_HW.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
    return np.asarray(small) >= 128


def _outline(mask_HW: Bools) -> Bools:
    """The two outermost pixels of a mask."""
    inner = Image.fromarray(mask_HW.astype(np.uint8) * 255).filter(ImageFilter.MinFilter(5))
    return mask_HW & (np.asarray(inner) == 0)


def _dot(picture: Image.Image, points_n2: Floats) -> None:
    draw = ImageDraw.Draw(picture)
    radius = max(3, round(max(picture.size) / 75))
    for (x, y), colour in zip(points_n2 * np.array(picture.size), COLOURS, strict=False):
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), fill=colour, outline=(255, 255, 255), width=2
        )
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=(0, 0, 0), width=1)
