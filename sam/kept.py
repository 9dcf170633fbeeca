"""Resized images as files that a store keeps: what the teacher saw, to the pixel."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, features

from .errors import ImageError, SamError

KEPT_KIND = "webp"
"""Lossless WebP. Of the lossless kinds that Pillow writes it is the smallest at its fastest setting (photos: two
thirds of PNG), and read faster than PNG."""

MAX_SIDE = 16383
"""Pixels; WebP's own limit."""


def refuse_keeping(image_size: int) -> None:
    """SamError where images of this size can't be kept on this machine."""
    if image_size > MAX_SIDE:
        raise SamError(
            f"images of {image_size} pixels can't be kept: WebP ends at {MAX_SIDE}; leave out --keep-images"
        )
    if not features.check("webp"):
        raise SamError(
            "this Pillow was built without WebP, which kept images are: install one of Pillow's wheels"
        )


def encode_kept(pixels_HWC: np.ndarray) -> bytes:
    """uint8 RGB (h, w, 3) as an image file from which `load_image` gives the very same pixels.

    It is decoded again to make sure; ImageError when another picture comes out.
    """
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, KEPT_KIND, lossless=True, quality=0, method=0)
    data = file.getvalue()
    with Image.open(io.BytesIO(data)) as image:
        if not np.array_equal(np.asarray(image), pixels_HWC):
            raise ImageError(
                f"its {KEPT_KIND} copy has other pixels: is this machine's Pillow, or memory, sound?"
            )
    return data
