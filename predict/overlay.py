"""Overlay picture of a segmentation: the photo, each mask tinted and outlined, and the prompts on top.

Shape suffixes: H, W rows and columns of an image or mask, C channels, L pixels of a flattened mask, 3 RGB.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..common.errors import PredictError
from .mask_files import SOFTWARE, Mask
from .prompts import ImagePrompts, Point

Rgb = npt.NDArray[np.uint8]

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    # No chroma subsampling: contours are a pixel or two wide.
    ".jpg": ("JPEG", {"quality": 92, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 92, "subsampling": 0}),
}
"""Pillow's format and options by file suffix."""

MAX_JPEG_SIDE = 65_500
"""Largest side of a JPEG in pixels, a limit of libjpeg."""

OPACITY = 0.45
"""Opacity of a mask's colour, 0 to 1."""
FIRST_HUE = 0.58
GOLDEN_RATIO = 0.618034
GREEN, RED, WHITE = (0, 170, 60), (220, 20, 40), (255, 255, 255)
POINT_SHARE = 110
"""Longest side of a picture in radii of a point's disc."""
LARGE = 800
"""Longest side in pixels from which lines are two pixels wide rather than one."""


def draw_overlay(image_HWC: Rgb, masks: Sequence[Mask], prompts: ImagePrompts) -> Rgb:
    """Draw masks and prompts over a photo.

    Where masks overlap, the smaller one is on top and hides the others. Foreground points are green, background
    points red; a box has its mask's colour.

    Args:
        image_HWC: uint8 RGB (H, W, 3); not changed.
        masks: masks of the photo's size; a mask's index determines its colour.
        prompts: prompts inside the photo.

    Returns:
        uint8 RGB (H, W, 3).
    """
    canvas_HWC = image_HWC.copy()
    line = 2 if max(canvas_HWC.shape[:2]) >= LARGE else 1
    for index in sorted(range(len(masks)), key=lambda i: -masks[i].area):
        _draw_mask(canvas_HWC, image_HWC, masks[index], mask_colour(index), line)
    for index, box in enumerate(prompts.boxes):
        _draw_box(canvas_HWC, [round(number) for number in box], mask_colour(index), line)
    for colour, points in ((GREEN, prompts.points), (RED, prompts.negative_points)):
        for point in points:
            draw_point(canvas_HWC, point, colour)
    return canvas_HWC


def mask_colour(index: int) -> tuple[int, int, int]:
    """Return a saturated RGB colour, 0 to 255, for the mask with this index.

    Hues in steps of the golden ratio are far apart.
    """
    red, green, blue = colorsys.hsv_to_rgb((FIRST_HUE + index * GOLDEN_RATIO) % 1, 0.88, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _draw_mask(canvas_HWC: Rgb, image_HWC: Rgb, mask: Mask, colour: tuple[int, int, int], line: int) -> None:
    """Draw a mask over the photo itself, so that it hides those drawn before."""
    x, y, width, height = mask.bbox
    where = np.s_[y : y + height, x : x + width]
    inside_HW = mask.pixels()[where]
    tinted_HWC = tinted(image_HWC[where], inside_HW, colour, line)
    canvas_HWC[where][inside_HW] = np.rint(tinted_HWC[inside_HW])


def tinted(
    image_HWC: npt.NDArray, cover_HW: npt.NDArray, colour: tuple[int, int, int], line: int
) -> npt.NDArray[np.float32]:
    """Return a picture with a mask over it, translucent and outlined.

    Args:
        image_HWC: RGB (H, W, 3), 0 to 255, of any dtype; not changed.
        cover_HW: share of each pixel that the mask covers, float 0 to 1, or bool (H, W).
        colour: RGB of the mask, 0 to 255.
        line: width of the outline in pixels.

    Returns:
        float32 RGB (H, W, 3), 0 to 255.
    """
    tint_3 = np.array(colour, np.float32)
    # All of the mask's colour at its outline, a part of it inside.
    edge_HW = contour(cover_HW, line)
    share_HW1 = (OPACITY * cover_HW + (1 - OPACITY) * edge_HW).astype(np.float32)[..., None]
    return (1 - share_HW1) * image_HWC + share_HW1 * tint_3


def contour(cover_HW: npt.NDArray, line: int) -> npt.NDArray:
    """Return the pixels of a mask within `line` steps up, down, left or right of its outside.

    Args:
        cover_HW: share of each pixel that the mask covers, float 0 to 1, or bool (H, W); everything beyond the array
            is outside.
        line: width of the contour in pixels.

    Returns:
        The share of each pixel that the contour covers, with the dtype of `cover_HW`: smooth where the mask's edges
        are.
    """
    core_HW = cover_HW
    for _ in range(line):
        padded = np.pad(core_HW, 1)
        for beside in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
            core_HW = np.minimum(core_HW, beside)
    return cover_HW ^ core_HW if cover_HW.dtype == np.bool_ else cover_HW - core_HW


def _draw_box(canvas_HWC: Rgb, box: Sequence[int], colour: tuple[int, int, int], line: int) -> None:
    """Draw a box's outline inside its border, and a white line inside that, for contrast with the mask."""
    x0, y0, x1, y1 = box
    x0, y0 = min(x0, canvas_HWC.shape[1] - 1), min(y0, canvas_HWC.shape[0] - 1)
    inside = canvas_HWC[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
    for paint in (colour, WHITE):
        if min(inside.shape[:2]) > 0:
            inside[:line] = inside[-line:] = inside[:, :line] = inside[:, -line:] = paint
        inside = inside[line:-line, line:-line]


def draw_point(
    canvas_HWC: Rgb, point: Point, colour: tuple[int, int, int], share: float = POINT_SHARE
) -> None:
    """Draw an antialiased disc with a white ring, centred on the point's pixel.

    Args:
        canvas_HWC: uint8 RGB (H, W, 3), drawn on.
        point: x and y of the pixel, inside the picture.
        colour: RGB of the disc, 0 to 255.
        share: longest side of the picture in radii of the disc.
    """
    x, y = point
    radius = max(1.0, max(canvas_HWC.shape[:2]) / share)
    ring = radius + max(1.5, radius / 2.5)
    reach = int(ring) + 2
    left, top = max(0, int(x) - reach), max(0, int(y) - reach)
    patch = canvas_HWC[top : int(y) + reach + 1, left : int(x) + reach + 1]
    rows, columns = np.ogrid[top : top + patch.shape[0], left : left + patch.shape[1]]
    distance = np.hypot(columns - x, rows - y)[..., None]
    for size, paint in ((ring, WHITE), (radius, colour)):
        cover = np.clip(size + 0.5 - distance, 0, 1)
        patch[:] = np.rint(patch * (1 - cover) + cover * np.array(paint))


def check_format(suffix: str, original_size: tuple[int, int]) -> None:
    """Refuse a picture that is too large for its file format.

    Args:
        suffix: suffix of the file's name, one of FORMATS in upper or lower case.
        original_size: height and width in pixels.

    Raises:
        PredictError: a JPEG would have a side above MAX_JPEG_SIDE.
    """
    height, width = original_size
    if FORMATS[suffix.lower()][0] == "JPEG" and max(height, width) > MAX_JPEG_SIDE:
        raise PredictError(
            f"a JPEG can't hold {width} x {height} pixels, at most {MAX_JPEG_SIDE:,} on a side: end --out in .png"
        )


def encode_picture(rgb_HWC: Rgb, suffix: str) -> bytes:
    """Encode a picture.

    Args:
        rgb_HWC: uint8 RGB (H, W, 3).
        suffix: suffix of the file's name, one of FORMATS in upper or lower case.

    Returns:
        The file's content.
    """
    kind, options = FORMATS[suffix.lower()]
    buffer = io.BytesIO()
    text = PngInfo()
    text.add_text("Software", SOFTWARE)
    described = {"pnginfo": text} if kind == "PNG" else {}
    Image.fromarray(rgb_HWC).save(buffer, kind, **options, **described)
    return buffer.getvalue()
