"""SAM's neck, the last layers of every SAM encoder: from the encoder's channels to the embedding's 256.

Shape suffixes: B images, C channels, H and W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..photos.preprocess import PATCH

EMBEDDING_CHANNELS = 256
"""Channels of SAM's embeddings, and width of its head."""


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of a (B, C, H, W) map, with epsilon 1e-6, as in SAM's neck."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalise a map; the result has the same shape (B, C, H, W), in channels-last strides."""
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        x_BHWC = F.layer_norm(x_BHWC, self.weight.shape, self.weight, self.bias, eps=1e-6)
        return x_BHWC.permute(0, 3, 1, 2)


def neck_projection(width: int) -> nn.Conv2d:
    """Build the first layer of the neck: `width` channels to the embedding's 256."""
    return nn.Conv2d(width, EMBEDDING_CHANNELS, 1, bias=False)


def neck_convolution() -> nn.Conv2d:
    """Build the layer between the neck's two norms."""
    return nn.Conv2d(EMBEDDING_CHANNELS, EMBEDDING_CHANNELS, 3, padding=1, bias=False)


def last_norm(encoder: nn.Module) -> LayerNorm2d | None:
    """Return the last layer of an encoder's neck; None for an encoder that doesn't end with SAM's neck."""
    neck = getattr(encoder, "neck", None)
    last = neck[-1] if isinstance(neck, nn.Sequential) else None
    return last if isinstance(last, LayerNorm2d) else None


def neck_rest() -> list[nn.Module]:
    """Build the layers of the neck after its projection."""
    return [LayerNorm2d(EMBEDDING_CHANNELS), neck_convolution(), LayerNorm2d(EMBEDDING_CHANNELS)]


def fuse_maps(maps: Iterable[Tensor], grid: int) -> Tensor:
    """Return the sum of maps of several resolutions, each resized bilinearly to the embedding's grid.

    Args:
        maps: maps (B, 256, H, W), after their projection; at least one.
        grid: side of the grid, in cells.
    """
    resized = [
        x_BCHW
        if x_BCHW.shape[-2:] == (grid, grid)
        else F.interpolate(x_BCHW, size=(grid, grid), mode="bilinear", align_corners=False)
        for x_BCHW in maps
    ]
    return reduce(torch.add, resized)


def finest_stride(image_size: int, student_size: int) -> int:
    """Return the stride of the finest map that a student's neck takes: the largest power of two at which the map has
    at least as many cells as the embedding's grid.

    Args:
        image_size: side of SAM's square in pixels.
        student_size: side of the student's input in pixels.
    """
    return 1 << ((student_size * PATCH // image_size).bit_length() - 1)


def input_side(encoder: nn.Module, image_size: int) -> int:
    """Return the side in pixels of the square that an encoder takes.

    Args:
        encoder: encoder of any kind; a student that takes a smaller input says so in its attribute `student_size`.
        image_size: side of SAM's square in pixels, which all other encoders take.
    """
    return getattr(encoder, "student_size", image_size)
