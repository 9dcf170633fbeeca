"""The weights of ``vit_nano``, the teacher that needs no download: SAM's architecture with a tiny encoder.

They lie beside this file in float16, keyed as in an official SAM checkpoint, and were trained by
examples/train_vit_nano.py on pictures of examples/generate_pictures.py; docs/VIT_NANO.md has the commands and what
the masks are worth.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files

import torch
from safetensors.torch import load
from torch import Tensor

from .head_shapes import head_shapes
from .vit import build_vit

WEIGHTS = files(__package__).joinpath("vit_nano.safetensors")
# The grid that the position tables are stored for: between the 16 of 256 px and the 64 of 1024 px, so that
# both are one halving or doubling away.
STORED_IMAGE_SIZE = 512


def read_weights() -> dict[str, Tensor]:
    """All of vit_nano's weights, keyed as in an official SAM checkpoint; about 5.7 M float32 values."""
    return {key: value.float() for key, value in load(WEIGHTS.read_bytes()).items()}


@cache
def weights_sha256() -> str:
    """Hex SHA-256 of the file of weights."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


def shapes() -> dict[str, torch.Size]:
    """Every key of vit_nano's state and its shape, positions for ``STORED_IMAGE_SIZE``."""
    with torch.device("meta"):
        encoder = build_vit("vit_nano", STORED_IMAGE_SIZE)
    found = {f"image_encoder.{key}": value.shape for key, value in encoder.state_dict().items()}
    return found | head_shapes()
