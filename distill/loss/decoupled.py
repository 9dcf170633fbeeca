"""Decoupled objective: mean squared error between the student's and the stored embedding (MobileSAM, section 3.2).

It doesn't involve the mask decoder. The other objectives can add it to their mask loss.

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
        """See `Objective.from_config`; `store` and `device` are not used."""
        return cls(config.loss_region)

    def loss(self, micro_batch: MicroBatch, totals: BatchTotals) -> Tensor:
        """See `Objective.loss`."""
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
        teacher_BCHW: (B, C, g, g), any float dtype, on the same device.
        valid_BHW: bool (B, g, g), True for cells whose centre lies in the image, not in the padding.
        elements: `loss_elements` of the WHOLE batch, so that the losses and gradients of its micro-batches, of any
            lengths, add up to those of the batch.
        region: "all" (every cell) or "valid" (cells of the image).

    Returns:
        A float32 scalar with gradients.
    """
    error_BCHW = student_BCHW.float() - teacher_BCHW.float()
    if region == "valid":
        # Before squaring, and not by a product: a NaN in a cell that isn't valid must not reach the gradient.
        error_BCHW = torch.where(valid_BHW[:, None], error_BCHW, error_BCHW.new_zeros(()))
    return error_BCHW.square().sum() / elements


def loss_elements(valid_BHW: Tensor, channels: int, region: str) -> int:
    """Return the number of embedding values that the loss of these images averages over.

    Args:
        valid_BHW: bool (B, g, g), True for cells whose centre lies in the image.
        channels: number of channels of the embedding, C.
        region: "all" counts every cell (the paper), "valid" only the valid ones.
    """
    cells = valid_BHW.numel() if region == "all" else int(valid_BHW.sum())
    return cells * channels
