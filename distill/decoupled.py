"""The decoupled objective: mean squared error against the stored embedding (MobileSAM, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .objective import Objective, Part, WholeBatch


def loss_elements(valid_BHW: Tensor, channels: int, region: str) -> int:
    """The number of embedding values that the loss of these images averages over.

    `valid_BHW` is bool: True where a grid cell's centre is image. With region "all" every cell counts (the
    paper), with "valid" only those cells.
    """
    cells = valid_BHW.numel() if region == "all" else int(valid_BHW.sum())
    return cells * channels


def decoupled_loss(
    student_BCHW: Tensor, teacher_BCHW: Tensor, valid_BHW: Tensor, elements: int, region: str
) -> Tensor:
    """Sum of squared errors over the region, divided by `elements`; a float32 scalar that carries gradients.

    `elements` is loss_elements() of the WHOLE batch, so that the losses of its micro-batches, whatever their
    lengths, add up to the loss of the batch, and so do their gradients.
    """
    error_BCHW = student_BCHW.float() - teacher_BCHW.float()
    if region == "valid":
        # Before squaring, and not by a product: a cell that doesn't count must not leak NaN into the gradient.
        error_BCHW = torch.where(valid_BHW[:, None], error_BCHW, error_BCHW.new_zeros(()))
    return error_BCHW.square().sum() / elements


class Decoupled(Objective):
    """No decoder in the loop: the student's embedding has to be the teacher's."""

    def __init__(self, region: str) -> None:
        super().__init__()
        self.region = region

    def loss(self, part: Part, whole: WholeBatch) -> Tensor:
        elements = whole.elements
        return decoupled_loss(part.student_BCHW, part.teacher_BCHW, part.valid_BHW, elements, self.region)
