"""SAM's neck, the last layers of every SAM encoder: from the encoder's channels to the embedding's 256.

Shape suffixes: B images, C channels, H and W rows and columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def neck_rest() -> list[nn.Module]:
    """Build the layers of the neck after its projection."""
    return [LayerNorm2d(EMBEDDING_CHANNELS), neck_convolution(), LayerNorm2d(EMBEDDING_CHANNELS)]
