from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import sam_model_registry

from mobilesam.sam.modeling.tiny_vit import TinyViT

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


@pytest.fixture(scope="session")
def filled() -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """filled(state) -> the state with random values in its position tables, which are zeros in new networks."""

    def fill(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        for key, value in state.items():
            if "pos" in key and value.is_floating_point() and "gaussian" not in key:
                value.normal_(0, 0.1, generator=generator)
        return state

    return fill


@pytest.fixture(scope="session")
def vit_b_file(
    tmp_path_factory: pytest.TempPathFactory,
    filled: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> Path:
    """An official vit_b checkpoint in everything but its values, written by segment_anything's classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoints") / "sam_vit_b.pth"
    torch.save(filled(sam_model_registry["vit_b"]().state_dict()), path)
    return path


@pytest.fixture(scope="session")
def mobile_sam_file(tmp_path_factory: pytest.TempPathFactory, vit_b_file: Path) -> Path:
    """A checkpoint like mobile_sam.pt: flat, with TinyViT's unused classifier."""
    torch.manual_seed(1)
    encoder = TinyViT(1024).state_dict()
    classifier = {
        "norm_head.weight": torch.ones(320),
        "norm_head.bias": torch.zeros(320),
        "head.weight": torch.randn(1000, 320),
        "head.bias": torch.zeros(1000),
    }
    state = {f"image_encoder.{key}": value for key, value in (encoder | classifier).items()}
    saved = torch.load(vit_b_file, weights_only=True)
    state |= {
        key: value for key, value in saved.items() if key.startswith(("prompt_encoder.", "mask_decoder."))
    }
    path = tmp_path_factory.mktemp("checkpoints") / "mobile_sam.pt"
    torch.save(state, path)
    return path
