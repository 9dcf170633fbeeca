"""The example photos as a teacher or student takes them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mobilesam.sam import image_pixels, load_image

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"


def photo_pixels(name: str, image_size: int) -> Tensor:
    """A photo, preprocessed: float32 (1, 3, image_size, image_size)."""
    return image_pixels(load_image((PHOTOS / name).read_bytes(), image_size), image_size)
