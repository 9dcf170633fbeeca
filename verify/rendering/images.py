"""Pictures for the reports: embeddings as colours, their error as a map, masks over a photo, all as data URIs.

Shape suffixes: C channels, H and W rows and columns of an image, embedding or mask, L cells of embeddings, g side of
the embedding's grid, P prompts of one point each and p some of them, 2 (x, y), 3 RGB or components, 4 RGBA.
"""

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

PICTURE_SIDE = 440
"""Longest side in pixels of a photo on the page."""

POINT_COLOURS = ((255, 176, 0), (0, 200, 255), (255, 64, 160), (130, 255, 80))
"""RGB of an image's first, second, ... point: distinct for colour-blind eyes too, and rare in photos."""

LEAST_SHARE, MOST_SHARE = 0.001, 0.95
"""Smallest and largest share of the image's pixels for a mask that shows what was segmented."""

SAME_MASK_IOU = 0.5
"""IoU from which two masks count as the same."""


def crop_to_valid(grid: npt.NDArray, valid_gg: Bools) -> npt.NDArray:
    """Return the image's part of `grid` (..., g, g): padding is right and below, so it is a top-left rectangle.

    At least one cell is kept: an image thinner than half a cell has no valid one.
    """
    rows = max(1, int(valid_gg.any(axis=1).sum()))
    columns = max(1, int(valid_gg.any(axis=0).sum()))
    return grid[..., :rows, :columns]


@dataclass(frozen=True, kw_only=True)
class EmbeddingColours:
    """Fixed map from an embedding's C channels to red, green and blue.

    Fitted on the teacher and used for teacher and student alike: equal embeddings get equal colours, and a
    student that drifts away shows other colours instead of being rescaled into the same ones.
    """

    mean_C: Floats
    components_3C: Floats
    """Orthonormal rows by falling variance; the largest loading of each is positive, which fixes its sign."""
    low_3: Floats
    high_3: Floats
    """The projections that become 0 and 255: the teacher's 1st and 99th percentile of each component."""
    explained: float
    """Share of the teacher's variance that the three components hold, 0 to 1."""

    @classmethod
    def fit(cls, teachers: Iterable[tuple[Floats, Bools]]) -> EmbeddingColours:
        """Fit principal components over the valid cells of `teachers`: pairs of emb_CHW and valid_gg."""
        cells_LC = np.concatenate([_cells(emb_CHW, valid_gg) for emb_CHW, valid_gg in teachers])
        mean_C = cells_LC.mean(axis=0)
        centred_LC = cells_LC - mean_C
        variances_C, vectors_CC = np.linalg.eigh(centred_LC.T @ centred_LC / len(cells_LC))
        variances_C = variances_C.clip(min=0)  # eigh may give -1e-18 for a zero
        components_3C = vectors_CC[:, ::-1][:, :3].T
        largest_3 = np.abs(components_3C).argmax(axis=1)
        components_3C = components_3C * np.sign(components_3C[np.arange(len(largest_3)), largest_3])[:, None]
        low_3, high_3 = np.percentile(centred_LC @ components_3C.T, [1, 99], axis=0)
        total = float(variances_C.sum())
        return cls(
            mean_C=mean_C,
            components_3C=components_3C,
            low_3=low_3,
            high_3=high_3,
            explained=float(variances_C[-3:].sum()) / total if total > 0 else 0.0,
        )

    def paint(self, emb_CHW: Floats, valid_gg: Bools) -> Rgb:
        """Return the valid cells of one embedding as an image, uint8 RGB (rows, columns, 3), one pixel a cell."""
        emb_CHW = crop_to_valid(emb_CHW, valid_gg).astype(np.float64)
        projected_HW3 = (emb_CHW.transpose(1, 2, 0) - self.mean_C) @ self.components_3C.T
        span_3 = self.high_3 - self.low_3
        flat_3 = span_3 <= 1e-12  # a teacher without variance: mid-grey rather than noise blown up to colours
        unit_HW3 = np.where(flat_3, 0.5, (projected_HW3 - self.low_3) / np.where(flat_3, 1.0, span_3))
        return np.rint(unit_HW3.clip(0, 1) * 255).astype(np.uint8)


def _cells(emb_CHW: Floats, valid_gg: Bools) -> Floats:
    """Return the valid cells of an embedding as rows, float64 (L, C)."""
    cropped_CHW = crop_to_valid(emb_CHW, valid_gg)
    return cropped_CHW.reshape(cropped_CHW.shape[0], -1).T.astype(np.float64)


def cosine_distance(student_CHW: Floats, teacher_CHW: Floats, valid_gg: Bools) -> Floats:
    """Return 1 - cosine over the channels of every valid cell, float64 (rows, columns), 0 to 2."""
    student_CHW = crop_to_valid(student_CHW, valid_gg).astype(np.float64)
    teacher_CHW = crop_to_valid(teacher_CHW, valid_gg).astype(np.float64)
    norms = np.linalg.norm(student_CHW, axis=0) * np.linalg.norm(teacher_CHW, axis=0)
    return 1.0 - (student_CHW * teacher_CHW).sum(axis=0) / np.maximum(norms, 1e-12)


def common_scale(errors: Iterable[Floats]) -> float:
    """Return the error at which the colours of all maps end: a round number above 99% of all cells, 0.001 at least.

    The floor keeps the rounding noise of a perfect student from filling the scale.
    """
    top = float(np.percentile(np.concatenate([error.ravel() for error in errors]), 99))
    if top <= 0.001:
        return 0.001
    unit = 10.0 ** np.floor(np.log10(top))
    step = next(step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 20) if step * unit >= top)
    return float(f"{step * unit:.12g}")


def paint_error(error_HW: Floats, top: float) -> Rgb:
    """Colour an error map with matplotlib's magma: uint8 RGB (rows, columns, 3); `top` and above are lightest.

    Colours follow the square root of the error: half-way up the colours lies `top` / 4. On a linear scale that
    holds the worst images, the best ones would be plain black.
    """
    from matplotlib import colormaps

    rgba_HW4 = colormaps["magma"](np.sqrt(np.clip(error_HW / top, 0, 1)), bytes=True)
    return np.ascontiguousarray(rgba_HW4[..., :3])


def png_uri(rgb_HW3: Rgb) -> str:
    """Return a picture as a lossless data URI."""
    return _uri(Image.fromarray(rgb_HW3), "png", optimize=True)


def thumbnail_uri(rgb_HW3: Rgb, longest: int = PICTURE_SIDE) -> str:
    """Return a photo as a JPEG data URI, its longest side at most `longest` pixels."""
    image = Image.fromarray(rgb_HW3)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _uri(image, "jpeg", quality=82, optimize=True, progressive=True)


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


@dataclass(frozen=True, kw_only=True)
class PointMasks:
    """Masks of teacher and student for some points of an image, at the size of its photo in the encoder's square."""

    points_p2: Floats
    """x and y, 0 to 1: shares of the photo's width and height."""
    teacher_pHW: Bools
    student_pHW: Bools
    ious_p: Floats
    """IoU of the two at the image's original size, as verify measures it."""
    image_iou: float
    """Mean over all points that were compared, not only these."""
    compared: int
    """Number of points that were compared."""


@dataclass(frozen=True, kw_only=True)
class MaskPanel:
    """`PointMasks` as data URIs and numbers."""

    teacher: str
    student: str
    points: list[tuple[str, float]]
    """CSS colour of each point, and its IoU."""
    image_iou: float
    compared: int


def choose_points(masks_PHW: Bools, most: int = 4) -> list[int]:
    """Return the positions of up to `most` masks that differ from each other (IoU below SAME_MASK_IOU), in order.

    Masks with less than LEAST_SHARE or more than MOST_SHARE of the image are taken only when there is no other.
    """
    shares_P = masks_PHW.mean(axis=(1, 2))
    usable_P = (shares_P >= LEAST_SHARE) & (shares_P <= MOST_SHARE)
    return _differing(masks_PHW, np.flatnonzero(usable_P), most) or _differing(
        masks_PHW, range(len(masks_PHW)), most
    )


def _differing(masks_PHW: Bools, candidates: Iterable[int], most: int) -> list[int]:
    chosen: list[int] = []
    for candidate in map(int, candidates):
        if len(chosen) == most:
            break
        earlier_pHW = masks_PHW[chosen]
        shared_p = (earlier_pHW & masks_PHW[candidate]).sum(axis=(1, 2))
        either_p = (earlier_pHW | masks_PHW[candidate]).sum(axis=(1, 2))
        if bool((iou(shared_p, either_p) < SAME_MASK_IOU).all()):
            chosen.append(candidate)
    return chosen


def mask_panel(photo_HWC: Rgb, masks: PointMasks) -> MaskPanel:
    """Paint the teacher's and the student's masks over the photo, each point in the same colour."""
    return MaskPanel(
        teacher=thumbnail_uri(paint_masks(photo_HWC, masks.teacher_pHW, masks.points_p2)),
        student=thumbnail_uri(paint_masks(photo_HWC, masks.student_pHW, masks.points_p2)),
        points=[
            (f"rgb{colour}", float(value)) for colour, value in zip(POINT_COLOURS, masks.ious_p, strict=False)
        ],
        image_iou=masks.image_iou,
        compared=masks.compared,
    )


def paint_masks(photo_HWC: Rgb, masks_pHW: Bools, points_p2: Floats, longest: int = PICTURE_SIDE) -> Rgb:
    """Paint masks over a photo: translucent, outlined, their points as dots.

    The photo is paled first, so that none of its own colours looks like a mask's.

    Args:
        photo_HWC: uint8 RGB.
        masks_pHW: bool, of the photo's size; at most as many as POINT_COLOURS.
        points_p2: x and y, 0 to 1: shares of the photo's width and height.
        longest: longest side of the result in pixels.

    Returns:
        uint8 RGB.
    """
    image = Image.fromarray(photo_HWC)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    picture_HWC = _paled(np.asarray(image))
    colours = [np.array(colour, dtype=np.float32) for colour in POINT_COLOURS[: len(masks_pHW)]]
    small_pHW = [_shrunk(mask_HW, image.size) for mask_HW in masks_pHW]
    # Large ones first, so that small ones lie on top.
    for i in sorted(range(len(small_pHW)), key=lambda i: -int(small_pHW[i].sum())):
        picture_HWC[small_pHW[i]] = 0.5 * picture_HWC[small_pHW[i]] + 0.5 * colours[i]
    for colour, mask_HW in zip(colours, small_pHW, strict=True):
        picture_HWC[_outline(mask_HW)] = colour
    painted = Image.fromarray(np.rint(picture_HWC).astype(np.uint8))
    _dot(painted, points_p2)
    return np.asarray(painted)


def _paled(photo_HWC: Rgb) -> npt.NDArray[np.float32]:
    grey_HW1 = photo_HWC.astype(np.float32).mean(axis=-1, keepdims=True)
    return 0.35 * photo_HWC + 0.65 * grey_HW1


def _shrunk(mask_HW: Bools, size: tuple[int, int]) -> Bools:
    """Reduce a mask to `size` (width, height): a pixel is in it if at least half of it was."""
    small = Image.fromarray(mask_HW.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
    return np.asarray(small) >= 128


def _outline(mask_HW: Bools) -> Bools:
    """Return the two outermost pixels of a mask."""
    inner = Image.fromarray(mask_HW.astype(np.uint8) * 255).filter(ImageFilter.MinFilter(5))
    return mask_HW & (np.asarray(inner) == 0)


def _dot(picture: Image.Image, points_p2: Floats) -> None:
    draw = ImageDraw.Draw(picture)
    radius = max(3, round(max(picture.size) / 75))
    for (x, y), colour in zip(points_p2 * np.array(picture.size), POINT_COLOURS, strict=False):
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), fill=colour, outline=(255, 255, 255), width=2
        )
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=(0, 0, 0), width=1)
