from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"


@pytest.fixture(scope="session")
def photos() -> dict[str, bytes]:
    """The bytes of every example photo, by name."""
    files = {
        path.name: path.read_bytes() for path in sorted(PHOTOS.iterdir()) if path.suffix in (".jpg", ".png")
    }
    assert len(files) >= 10
    return files


@pytest.fixture(scope="session")
def scene() -> np.ndarray:
    """A smooth uint8 RGB picture (40, 60, 3) that differs in all four corners and in every channel."""
    y, x = np.mgrid[0:40, 0:60]
    return np.stack([x * 4 + 10, y * 6 + 5, 250 - x * 2 - y * 3], axis=-1).astype(np.uint8)


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """encode(array or Pillow image, format, **options) -> the bytes of an image file."""

    def encode_image(picture: np.ndarray | Image.Image, format: str, **options: Any) -> bytes:
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    return encode_image
