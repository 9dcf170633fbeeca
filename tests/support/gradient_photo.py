"""Small photo of colours that run across it, another one for each number."""

from __future__ import annotations

import numpy as np
from PIL import Image


def gradient_photo(number: int, size: tuple[int, int] = (48, 64), steepness: int = 2) -> Image.Image:
    """Return an RGB picture.

    Args:
        number: number of the picture; others look alike but have other pixels.
        size: (height, width) in pixels.
        steepness: change of red and green from pixel to pixel.
    """
    y, x = np.mgrid[: size[0], : size[1]]
    bands = [(steepness * x + 20 * number) % 256, steepness * y % 256, (x + y + 9 * number) % 256]
    return Image.fromarray(np.stack(bands, -1).astype(np.uint8))
