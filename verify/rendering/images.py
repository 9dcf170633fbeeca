"""Pictures for the reports: embeddings as colours, error maps, masks over a photo, and their data URIs.

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
from PIL import Image

from ...distill.metrics.masks import iou
from ...predict.overlay import draw_point, tinted

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]
Rgb = npt.NDArray[np.uint8]

PICTURE_SIDE = 440
"""Longest side in pixels of a photo on the page."""

LARGE_SIDE = 640
"""Longest side in pixels of a photo at the top of the page, and of masks before they are reduced."""

LINE_SHARE, POINT_SHARE = 220, 80
"""Longest side of a picture in widths of its masks' outlines, and in radii of its dots."""

POINT_COLOURS = ((255, 176, 0), (0, 200, 255), (255, 64, 160), (130, 255, 80))
"""RGB of an image's first, second, ... point: distinguishable with colour blindness too, and rare in photos."""

LEAST_SHARE, MOST_SHARE = 0.01, 0.95
"""Smallest and largest share of the image's pixels for a mask worth showing."""

SAME_MASK_IOU = 0.5
"""IoU at and above which two masks count as the same."""


def crop_to_valid(grid: npt.NDArray, valid_gg: Bools) -> npt.NDArray:
    """Return the image's part of a grid: the top-left rectangle, since padding is on the right and below.

    Args:
        grid: array (..., g, g).
        valid_gg: bool (g, g), True for cells whose centre lies in the image.

    Returns:
        Array (..., rows, columns), at least one of each: an image thinner than half a cell has no valid cell.
    """
    rows = max(1, int(valid_gg.any(axis=1).sum()))
    columns = max(1, int(valid_gg.any(axis=0).sum()))
    return grid[..., :rows, :columns]


@dataclass(frozen=True, kw_only=True)
class EmbeddingColours:
    """Fixed map from an embedding's C channels to red, green and blue.

    Fitted on the teacher and used for teacher and student: equal embeddings get equal colours, and a student that
    deviates shows other colours, since it isn't rescaled.
    """

    mean_C: Floats
    """Mean of the teacher's cells."""
    components_3C: Floats
    """Principal components, orthonormal rows by decreasing variance; the largest loading of each is positive, which
    fixes its sign."""
    low_3: Floats
    """Projections that become 0: the teacher's 1st percentile of each component."""
    high_3: Floats
    """Projections that become 255: the teacher's 99th percentile of each component."""
    explained: float
    """Share of the teacher's variance in the three components, 0 to 1."""

    @classmethod
    def fit(cls, teachers: Iterable[tuple[Floats, Bools]]) -> EmbeddingColours:
        """Fit principal components over valid cells.

        Args:
            teachers: pairs of the teacher's embedding (C, g, g) and its valid cells, bool (g, g); at least one.
        """
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
        """Paint the valid cells of one embedding, one pixel per cell.

        Args:
            emb_CHW: float (C, g, g).
            valid_gg: bool (g, g), True for cells whose centre lies in the image.

        Returns:
            uint8 RGB (rows, columns, 3).
        """
        emb_CHW = crop_to_valid(emb_CHW, valid_gg).astype(np.float64)
        projected_HW3 = (emb_CHW.transpose(1, 2, 0) - self.mean_C) @ self.components_3C.T
        span_3 = self.high_3 - self.low_3
        flat_3 = span_3 <= 1e-12  # a teacher without variance: mid-grey, not amplified rounding noise
        unit_HW3 = np.where(flat_3, 0.5, (projected_HW3 - self.low_3) / np.where(flat_3, 1.0, span_3))
        return np.rint(unit_HW3.clip(0, 1) * 255).astype(np.uint8)


def _cells(emb_CHW: Floats, valid_gg: Bools) -> Floats:
    """Return the valid cells of an embedding as rows, float64 (L, C)."""
    cropped_CHW = crop_to_valid(emb_CHW, valid_gg)
    return cropped_CHW.reshape(cropped_CHW.shape[0], -1).T.astype(np.float64)


def cosine_distance(student_CHW: Floats, teacher_CHW: Floats, valid_gg: Bools) -> Floats:
    """Return 1 - cosine over the channels of every valid cell.

    Args:
        student_CHW: float (C, g, g).
        teacher_CHW: float (C, g, g).
        valid_gg: bool (g, g), True for cells whose centre lies in the image.

    Returns:
        float64 (rows, columns), 0 to 2.
    """
    student_CHW = crop_to_valid(student_CHW, valid_gg).astype(np.float64)
    teacher_CHW = crop_to_valid(teacher_CHW, valid_gg).astype(np.float64)
    norms = np.linalg.norm(student_CHW, axis=0) * np.linalg.norm(teacher_CHW, axis=0)
    return 1.0 - (student_CHW * teacher_CHW).sum(axis=0) / np.maximum(norms, 1e-12)


def common_scale(errors: Iterable[Floats]) -> float:
    """Return the upper end of the colour scale of all error maps: the 99th percentile of all cells, rounded up.

    It is at least 0.001, so that the rounding noise of a perfect student doesn't fill the scale.
    """
    top = float(np.percentile(np.concatenate([error.ravel() for error in errors]), 99))
    if top <= 0.001:
        return 0.001
    unit = 10.0 ** np.floor(np.log10(top))
    step = next(step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 20) if step * unit >= top)
    return float(f"{step * unit:.12g}")


def paint_error(error_HW: Floats, top: float) -> Rgb:
    """Colour an error map with matplotlib's magma.

    Colours follow the square root of the error: the middle of the colour map is `top` / 4. On a linear scale up to
    the errors of the worst images, the best ones would be black.

    Args:
        error_HW: float (H, W), errors from 0.
        top: error of the lightest colour; larger errors get the same.

    Returns:
        uint8 RGB (H, W, 3).
    """
    from matplotlib import colormaps

    rgba_HW4 = colormaps["magma"](np.sqrt(np.clip(error_HW / top, 0, 1)), bytes=True)
    return np.ascontiguousarray(rgba_HW4[..., :3])


def png_uri(rgb_HW3: Rgb) -> str:
    """Encode a picture, uint8 RGB (H, W, 3), as a PNG data URI."""
    return _uri(Image.fromarray(rgb_HW3), "png", optimize=True)


def at_side(rgb_HW3: Rgb, longest: int) -> Rgb:
    """Reduce or enlarge a photo.

    Args:
        rgb_HW3: uint8 RGB (H, W, 3).
        longest: longest side of the result in pixels.

    Returns:
        uint8 RGB (H, W, 3).
    """
    height, width = rgb_HW3.shape[:2]
    scale = longest / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(rgb_HW3).resize(size, Image.Resampling.LANCZOS))


def thumbnail_uri(rgb_HW3: Rgb, longest: int = PICTURE_SIDE) -> str:
    """Reduce a photo and encode it as a JPEG data URI.

    Args:
        rgb_HW3: uint8 RGB (H, W, 3).
        longest: largest side of the result in pixels.
    """
    image = Image.fromarray(rgb_HW3)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _uri(image, "jpeg", quality=82, optimize=True, progressive=True)


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


@dataclass(frozen=True, kw_only=True)
class PointMasks:
    """Masks of teacher and student for some points of an image, over its whole photo, of any size."""

    points_p2: Floats
    """x and y as shares of the photo's width and height, 0 to 1."""
    teacher_pHW: Floats
    """Share of each pixel that the mask covers, float32 (p, H, W), 0 to 1."""
    student_pHW: Floats
    """The same of the student."""
    ious_p: Floats
    """IoU of both masks at the image's original size, as verify measures it."""
    image_iou: float
    """Mean IoU over all points compared, not only these."""
    compared: int
    """Number of points compared."""


@dataclass(frozen=True, kw_only=True)
class MaskPanel:
    """`PointMasks` as data URIs and numbers."""

    teacher: str
    """Data URI of the photo with the teacher's masks."""
    student: str
    """Data URI of the photo with the student's masks."""
    points: list[tuple[str, float]]
    """CSS colour of each point, and its IoU."""
    image_iou: float
    compared: int


def choose_points(masks_PHW: Bools, most: int = len(POINT_COLOURS)) -> list[int]:
    """Return the indices of masks that differ from each other (IoU below SAME_MASK_IOU), in order.

    Masks with less than LEAST_SHARE or more than MOST_SHARE of the image are chosen only if there are no others.

    Args:
        masks_PHW: bool (P, H, W).
        most: largest number of indices.
    """
    return _differing(masks_PHW, np.flatnonzero(usable(masks_PHW)), most) or _differing(
        masks_PHW, range(len(masks_PHW)), most
    )


def usable(masks_PHW: Bools) -> Bools:
    """Return for each mask if it has a part of the image that is worth showing, bool (P,)."""
    shares_P: Floats = masks_PHW.mean(axis=(1, 2))
    return (shares_P >= LEAST_SHARE) & (shares_P <= MOST_SHARE)


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


def mask_panel(photo_HWC: Rgb, masks: PointMasks, longest: int = PICTURE_SIDE) -> MaskPanel:
    """Paint the teacher's and the student's masks over the photo, in the same colour for the same point.

    Args:
        photo_HWC: uint8 RGB (H, W, 3).
        masks: masks over the photo, of any size, at most as many as POINT_COLOURS.
        longest: largest side of the pictures in pixels.
    """
    return MaskPanel(
        teacher=thumbnail_uri(paint_masks(photo_HWC, masks.teacher_pHW, masks.points_p2, longest), longest),
        student=thumbnail_uri(paint_masks(photo_HWC, masks.student_pHW, masks.points_p2, longest), longest),
        points=[
            (f"rgb{colour}", float(value)) for colour, value in zip(POINT_COLOURS, masks.ious_p, strict=False)
        ],
        image_iou=masks.image_iou,
        compared=masks.compared,
    )


def paint_masks(
    photo_HWC: Rgb, masks_pHW: Floats | Bools, points_p2: Floats, longest: int = PICTURE_SIDE
) -> Rgb:
    """Paint masks over a photo: translucent, outlined, their points as dots.

    The photo's saturation is reduced first, so that its colours don't look like a mask's.

    Args:
        photo_HWC: uint8 RGB (H, W, 3).
        masks_pHW: share of each pixel that a mask covers, float (p, H, W), 0 to 1, or bool; over the photo, of any
            size; at most as many as POINT_COLOURS.
        points_p2: float (p, 2), x and y as shares of the photo's width and height, 0 to 1.
        longest: largest side of the result in pixels.

    Returns:
        uint8 RGB (H, W, 3), H and W those of the reduced photo.
    """
    image = Image.fromarray(photo_HWC)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    picture_HWC = _paled(np.asarray(image))
    covers_pHW = [_resized(mask_HW, image.size) for mask_HW in masks_pHW]
    line = max(2, round(max(image.size) / LINE_SHARE))
    # Large masks first, so that small ones are on top.
    for i in sorted(range(len(covers_pHW)), key=lambda i: -float(covers_pHW[i].sum())):
        picture_HWC = tinted(picture_HWC, covers_pHW[i], POINT_COLOURS[i], line)
    painted_HWC = np.rint(picture_HWC).astype(np.uint8)
    height, width = painted_HWC.shape[:2]
    for (x, y), colour in zip(points_p2 * (width, height), POINT_COLOURS, strict=False):
        draw_point(painted_HWC, (min(x, width - 1), min(y, height - 1)), colour, POINT_SHARE)
    return painted_HWC


def _paled(photo_HWC: Rgb) -> npt.NDArray[np.float32]:
    grey_HW1 = photo_HWC.astype(np.float32).mean(axis=-1, keepdims=True)
    return 0.35 * photo_HWC + 0.65 * grey_HW1


def _resized(mask_HW: Floats | Bools, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Resize a mask to `size` (width, height): the share of each pixel that it covers."""
    cover = Image.fromarray(mask_HW.astype(np.float32))
    larger = cover.width < size[0] or cover.height < size[1]
    return np.asarray(cover.resize(size, Image.Resampling.BILINEAR if larger else Image.Resampling.BOX))
