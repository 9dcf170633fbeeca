"""What teacher and student say to the same points of one image, as pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from ..distill.mask_comparison import iou
from .pictures import Bools, Floats, Rgb, thumbnail_uri

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
