"""The weights of ``vit_nano``, the teacher that needs no download: SAM's architecture with a tiny encoder.

They are not trained: raw PCG64 integers, mapped to uniform floats in arithmetic that is exact in IEEE 754, so
that every machine gets the same bytes (torch's own generators differ between processors). The scales below
make the embedding follow what is in each cell of the image, smoothly enough for a student to learn it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .head_shapes import head_shapes
from .vit import build_vit

# The grid that the position tables are stored for: between the 16 of 256 px and the 64 of 1024 px, so that
# both are one halving or doubling away.
STORED_IMAGE_SIZE = 512
SEED = "vit_nano/1"

# Standard deviations relative to 1/sqrt(fan in), by the end of the key; 1 where nothing is said.
GAINS = {
    # Residual branches change the stream without drowning what the patch itself says.
    "attn.proj.weight": 0.25,
    "mlp.lin2.weight": 0.25,
}
# Standard deviations as they are, where there is no fan in.
SCALES = {
    "pos_embed": 0.05,
    "rel_pos_h": 0.1,
    "rel_pos_w": 0.1,
    # A patch without contrast (padding, a black border) gets a direction of its own, and the norms after
    # it turn with the patch's colour smoothly instead of flipping.
    "patch_embed.proj.bias": 0.35,
    "positional_encoding_gaussian_matrix": 1.0,
}
# The patch embedding looks at its 16 x 16 pixels as this many blocks a side, each of one colour: noise inside
# a cell says nothing that a student should have to learn.
PATCH_BLOCKS = 2
# The neck's 3 x 3 convolution weighs a neighbour's row or column by this: a cell speaks mainly of itself.
NECK_NEIGHBOUR = 0.25


def untrained_state() -> dict[str, Tensor]:
    """All of vit_nano's weights, keyed as in an official SAM checkpoint; about 5.7 M float32 values."""
    return {key: torch.from_numpy(_values(key, shape)) for key, shape in shapes().items()}


def shapes() -> dict[str, torch.Size]:
    """Every key of vit_nano's state and its shape, positions for ``STORED_IMAGE_SIZE``."""
    with torch.device("meta"):
        encoder = build_vit("vit_nano", STORED_IMAGE_SIZE)
    found = {f"image_encoder.{key}": value.shape for key, value in encoder.state_dict().items()}
    return found | head_shapes()


@cache
def untrained_sha256() -> str:
    """The digest that stands for a checkpoint's: of ``untrained_state()``, so it changes with the recipe."""
    return state_sha256(untrained_state())


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over keys in sorted order, each with its shape and little-endian float32 bytes."""
    digest = hashlib.sha256()
    for key in sorted(state):
        array = np.ascontiguousarray(state[key].numpy(), dtype="<f4")
        digest.update(f"{key} {tuple(array.shape)}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _values(key: str, shape: torch.Size) -> np.ndarray:
    deviation = _deviation(key, shape)
    if deviation == 0:
        constant = 1 if key.endswith("weight") else 0
        return np.full(shape, constant, np.float32)
    if key.endswith("patch_embed.proj.weight"):
        return _patch_values(key, shape, deviation)
    values = _uniform(key, shape, deviation)
    return values * _neck_profile() if key.endswith("neck.2.weight") else values


def _patch_values(key: str, shape: torch.Size, deviation: float) -> np.ndarray:
    """Weights that are constant in each of ``PATCH_BLOCKS`` x ``PATCH_BLOCKS`` blocks of the patch."""
    side = shape[-1] // PATCH_BLOCKS
    # A block's pixels agree, so their sum grows by side^2 where independent ones would give side.
    blocks_shape = torch.Size((*shape[:2], PATCH_BLOCKS, PATCH_BLOCKS))
    blocks = _uniform(key, blocks_shape, deviation / side)
    return blocks.repeat(side, axis=2).repeat(side, axis=3)


def _neck_profile() -> np.ndarray:
    """(3, 3) float32: powers of two, so that products stay exact; the sum of squares is about 1.27."""
    line = np.array([NECK_NEIGHBOUR, 1, NECK_NEIGHBOUR], np.float32)
    return line[:, None] * line[None, :]


def _uniform(key: str, shape: torch.Size, deviation: float) -> np.ndarray:
    """Float32 values of this standard deviation, evenly spread around 0, decided by the key alone."""
    # The key is the seed, so a weight keeps its values when another is added or renamed.
    seed = int.from_bytes(hashlib.sha256(f"{SEED}/{key}".encode()).digest()[:8], "big")
    raw = np.random.PCG64(seed).random_raw(math.prod(shape))
    # 24 bits: each integer and its quotient by a power of two is exactly a float32 in [-1, 1).
    unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)
    # A uniform value in [-b, b) deviates by b / sqrt(3). IEEE 754 rounds sqrt and products exactly.
    return (unit * np.float32(deviation * math.sqrt(3))).reshape(shape)


def _deviation(key: str, shape: torch.Size) -> float:
    """The standard deviation of a weight's values; 0 for what is constant (norms, most biases)."""
    for end, scale in SCALES.items():
        if key.endswith(end):
            return scale
    if len(shape) == 1:
        return 0.0
    gain = next((gain for end, gain in GAINS.items() if key.endswith(end)), 1.0)
    return gain / math.sqrt(_fan_in(key, shape))


def _fan_in(key: str, shape: torch.Size) -> int:
    if "embed" in key.rsplit(".", 2)[-2] or "_token" in key:
        return 1
    if "output_upscaling" in key:
        # A transposed convolution whose stride is its kernel: one input cell per output.
        return shape[0]
    return math.prod(shape[1:])
