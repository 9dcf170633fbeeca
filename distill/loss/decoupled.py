"""Decoupled objective: mean squared error between the student's and the stored embedding (MobileSAM, section 3.2).

The mask decoder takes no part in it. The other objectives can add the same error to their masks' loss.

Shape suffixes: B images, C channels, H and W rows and columns of the embedding's grid (g x g).
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from ...store import EmbeddingStore
from ..config import DistillConfig
from .base import BatchTotals, MicroBatch, Objective


class Decoupled(Objective):
    """MSE of embeddings.

    Args:
        region: "all" (every grid cell, as in the paper) or "valid" (cells whose centre is image).
    """

    def __init__(self, region: str) -> None:
        super().__init__()
        self.region = region

    @classmethod
    def from_config(cls, config: DistillConfig, store: EmbeddingStore, device: torch.device) -> Self:
        """Build the objective; neither the store nor the device matters to it."""
        return cls(config.loss_region)

    def loss(self, micro_batch: MicroBatch, totals: BatchTotals) -> Tensor:
        """Return the micro-batch's share of the batch's MSE."""
        return decoupled_loss(
            micro_batch.student_BCHW,
            micro_batch.teacher_BCHW,
            micro_batch.valid_BHW,
            totals.elements,
            self.region,
        )


def decoupled_loss(
    student_BCHW: Tensor, teacher_BCHW: Tensor, valid_BHW: Tensor, elements: int, region: str
) -> Tensor:
    """Return the sum of squared errors over the region, divided by `elements`.

    Args:
        student_BCHW: (B, C, g, g), any float dtype.
        teacher_BCHW: of the same shape, on the same device.
        valid_BHW: bool (B, g, g), True where a cell's centre is image.
        elements: `loss_elements` of the WHOLE batch, so that the losses and gradients of its micro-batches, whatever
            their lengths, add up to those of the batch.
        region: "all" or "valid".

    Returns:
        A float32 scalar with gradients.
    """
    error_BCHW = student_BCHW.float() - teacher_BCHW.float()
    if region == "valid":
        # Before squaring, and not by a product: a cell that doesn't count must not leak NaN into the gradient.
        error_BCHW = torch.where(valid_BHW[:, None], error_BCHW, error_BCHW.new_zeros(()))
    return error_BCHW.square().sum() / elements


def loss_elements(valid_BHW: Tensor, channels: int, region: str) -> int:
    """Return the number of embedding values that the loss of these images averages over.

    Args:
        valid_BHW: bool (B, g, g), True where a cell's centre is image.
        channels: of the embedding.
        region: "all" counts every cell (the paper), "valid" only the valid ones.
    """
    cells = valid_BHW.numel() if region == "all" else int(valid_BHW.sum())
    return cells * channels
