"""Decoupled objective: error between the student's and the stored embedding (MobileSAM, section 3.2).

It doesn't involve the mask decoder. The other objectives can add it to their mask loss. MSE is the paper's loss and
the default; the others are those of other projects, for comparison (docs/RECIPE.md).

Shape suffixes: B images, C channels, H and W rows and columns of the embedding's grid (g x g).
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...store import EmbeddingStore
from ..config import DistillConfig
from .base import BatchTotals, MicroBatch, Objective


class Decoupled(Objective):
    """Error of embeddings.

    Args:
        region: "all" (every grid cell, as in the paper) or "valid" (cells whose centre is image).
        kind: one of `recipe.LOSSES`.
    """

    def __init__(self, region: str, kind: str = "mse") -> None:
        super().__init__()
        self.region, self.kind = region, kind

    @classmethod
    def from_config(cls, config: DistillConfig, store: EmbeddingStore, device: torch.device) -> Self:
        """See `Objective.from_config`; `store` and `device` are not used."""
        recipe = config.resolved_recipe
        return cls(recipe.loss_region, recipe.loss)

    def loss(self, micro_batch: MicroBatch, totals: BatchTotals) -> Tensor:
        """See `Objective.loss`."""
        return decoupled_loss(
            micro_batch.student_BCHW,
            micro_batch.teacher_BCHW,
            micro_batch.valid_BHW,
            totals,
            region=self.region,
            kind=self.kind,
        )


def decoupled_loss(
    student_BCHW: Tensor,
    teacher_BCHW: Tensor,
    valid_BHW: Tensor,
    totals: BatchTotals,
    *,
    region: str,
    kind: str = "mse",
) -> Tensor:
    """Return the micro-batch's share of the batch's error.

    - "mse": squared error, mean over values.
    - "huber": Huber's, squared up to an error of 1 and linear above, mean over values (NanoSAM).
    - "mse_cosine": squared error summed over channels, plus 1 - cosine over channels, mean over cells
      (EfficientSAM3's first stage; its mean is over cells of an image, then over images).
    - "root": root of the squared error summed over channels and averaged over an image's cells, mean over images
      (MobileSAM-pytorch; its root is of the batch's mean).

    Args:
        student_BCHW: (B, C, g, g), any float dtype.
        teacher_BCHW: (B, C, g, g), any float dtype, on the same device.
        valid_BHW: bool (B, g, g), True for cells whose centre lies in the image, not in the padding.
        totals: denominators of the WHOLE batch, so that the losses and gradients of its micro-batches, of any
            lengths, add up to those of the batch.
        region: "all" (every cell) or "valid" (cells of the image).
        kind: one of `recipe.LOSSES`.

    Returns:
        A float32 scalar with gradients.
    """
    student_BCHW, teacher_BCHW = student_BCHW.float(), teacher_BCHW.float()
    if region == "valid":
        # First of all, and not by a product: a NaN in a cell that isn't valid must not reach the gradient.
        student_BCHW, teacher_BCHW = (
            torch.where(valid_BHW[:, None], emb_BCHW, emb_BCHW.new_zeros(()))
            for emb_BCHW in (student_BCHW, teacher_BCHW)
        )
    error_BCHW = student_BCHW - teacher_BCHW
    if kind == "mse":
        return error_BCHW.square().sum() / totals.elements
    if kind == "huber":
        return F.huber_loss(error_BCHW, torch.zeros_like(error_BCHW), reduction="sum") / totals.elements
    if kind == "root":
        cells_B = valid_BHW.sum((1, 2)).clamp(min=1) if region == "valid" else valid_BHW[0].numel()
        # The root's gradient is infinite at 0.
        return (error_BCHW.square().sum((1, 2, 3)) / cells_B).clamp(min=1e-12).sqrt().sum() / totals.images
    assert kind == "mse_cosine", kind
    distance_BHW = 1 - F.cosine_similarity(student_BCHW, teacher_BCHW, dim=1)
    if region == "valid":
        distance_BHW = torch.where(valid_BHW, distance_BHW, distance_BHW.new_zeros(()))
    cells = totals.elements / student_BCHW.shape[1]
    return (error_BCHW.square().sum() + distance_BHW.sum()) / cells


def loss_elements(valid_BHW: Tensor, channels: int, region: str) -> int:
    """Return the number of embedding values that the loss of these images averages over.

    Args:
        valid_BHW: bool (B, g, g), True for cells whose centre lies in the image.
        channels: number of channels of the embedding, C.
        region: "all" counts every cell (the paper), "valid" only the valid ones.
    """
    cells = valid_BHW.numel() if region == "all" else int(valid_BHW.sum())
    return cells * channels
