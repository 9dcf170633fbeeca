"""SAM's preprocessing up to the canvas: resize the longest side, lay the pixels into the top-left corner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .decode import decode_rgb
from .errors import ImageError

PATCH = 16
"""Pixels that one cell of the embedding grid covers in each direction."""

PIXEL_MEAN = (123.675, 116.28, 103.53)
"""Mean of R, G, B on the 0-255 scale (segment_anything/build_sam.py)."""

PIXEL_STD = (58.395, 57.12, 57.375)
"""Standard deviation of R, G, B on the 0-255 scale (segment_anything/build_sam.py)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedImage:
    """One image, decoded and resized."""

    pixels_HWC: np.ndarray
    """uint8 RGB (h, w, 3), read-only, `resized_size` high and wide."""
    original_size: tuple[int, int]
    """(height, width) of the picture as it is seen: after its EXIF orientation."""
    resized_size: tuple[int, int]
    """(height, width) of `pixels_HWC`."""


def resized_size(height: int, width: int, image_size: int = 1024) -> tuple[int, int]:
    """(height, width) once the longest side is `image_size`, rounded as `ResizeLongestSide.get_preprocess_shape`.

    Raises ImageError for a strip so thin that its short side would vanish.
    """
    scale = image_size * 1.0 / max(height, width)
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    if min(size) < 1:
        raise ImageError(f"too thin: {width} x {height} pixels would be resized to {size[1]} x {size[0]}")
    return size


def resize_longest_side(image_HWC: np.ndarray, image_size: int) -> np.ndarray:
    """Resize uint8 RGB (H, W, 3) to a longest side of `image_size`; returns uint8 (h, w, 3), read-only.

    Pillow's antialiased bilinear filter: bit-equal to `ResizeLongestSide.apply_image` in
    segment_anything/utils/transforms.py, the reference path of SAM.
    """
    return np.asarray(_resize(Image.fromarray(image_HWC), image_size))


def load_image(data: bytes, image_size: int = 1024) -> DecodedImage:
    """Decode an image file's bytes (policies: `decode_image`) and resize the longest side to `image_size`.

    Raises ImageError with the reason where the bytes are no image that can be used.
    """
    image = decode_rgb(data)
    original_size = (image.height, image.width)
    pixels_HWC = np.asarray(_resize(image, image_size))
    return DecodedImage(
        pixels_HWC=pixels_HWC,
        original_size=original_size,
        resized_size=(pixels_HWC.shape[0], pixels_HWC.shape[1]),
    )


def place_on_canvas(image: DecodedImage, canvas_HWC: np.ndarray) -> None:
    """Write a whole uint8 canvas (S, S, 3): the pixels in its top-left corner, black beyond them."""
    height, width = image.resized_size
    canvas_HWC[:height, :width] = image.pixels_HWC
    canvas_HWC[:height, width:] = 0
    canvas_HWC[height:] = 0


def valid_cells(resized_size: tuple[int, int], image_size: int = 1024) -> np.ndarray:
    """Which cells of the embedding grid show image, as bool (g, g) with g = image_size / 16.

    Cell (i, j) does if its centre, pixel (16 i + 8, 16 j + 8), lies inside the resized image. A strip thinner than
    half a cell keeps its first row or column: every image has a valid cell, and no mean divides by zero.
    """
    centres = np.arange(image_size // PATCH) * PATCH + PATCH // 2
    rows, columns = centres < resized_size[0], centres < resized_size[1]
    rows[0] = columns[0] = True
    return rows[:, None] & columns[None, :]


def preprocessing_recipe(image_size: int = 1024) -> dict[str, Any]:
    """What lies between a file's bytes and the teacher, as plain JSON values to save and to compare."""
    return {
        "version": 1,
        "decode": {
            "orientation": "EXIF applied",
            "alpha": "dropped",
            "grey16": "scaled to 8 bits by the full range",
            "frames": "first",
            "icc": "ignored",
        },
        "resize": {
            "image_size": image_size,
            "rule": "int(side * image_size / max(height, width) + 0.5)",
            "filter": "Pillow bilinear, antialiased, uint8",
        },
        "normalize": {"mean": list(PIXEL_MEAN), "std": list(PIXEL_STD), "scale": "0-255", "channels": "RGB"},
        "pad": "zeros, right and bottom, after normalising",
    }


def _resize(image: Image.Image, image_size: int) -> Image.Image:
    height, width = resized_size(image.height, image.width, image_size)
    return image.resize((width, height), Image.Resampling.BILINEAR)
