"""What a predicted mask costs: focal and dice loss, and the error of its predicted IoU (SAM, appendix A).

Shape suffixes: P prompts, T candidate masks of each, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0


@dataclass(frozen=True, kw_only=True)
class MaskLossWeights:
    """focal : dice is 20 : 1 and the IoU's squared error counts 1, as SAM was trained."""

    focal: float = 20.0
    dice: float = 1.0
    iou: float = 1.0


def focal_loss(logits_PTHW: Tensor, masks_PHW: Tensor, inside_PHW: Tensor) -> Tensor:
    """Mean focal loss over the pixels that count, float32 (P, T) (arXiv 1708.02002, alpha 0.25 and gamma 2).

    `masks_PHW` and `inside_PHW` are bool.
    """
    targets_P1HW = masks_PHW[:, None].to(logits_PTHW.dtype)
    # In terms of the logit of the right answer: cross entropy is softplus(-z), 1 - p is sigmoid(-z).
    right_PTHW = logits_PTHW * (2 * targets_P1HW - 1)
    cross_PTHW = F.softplus(-right_PTHW)
    alpha_P1HW = (1 - FOCAL_ALPHA) + (2 * FOCAL_ALPHA - 1) * targets_P1HW
    loss_PTHW = alpha_P1HW * torch.sigmoid(-right_PTHW).square() * cross_PTHW
    counted_P1HW = inside_PHW[:, None].to(loss_PTHW.dtype)
    return (loss_PTHW * counted_P1HW).sum(dim=(2, 3)) / counted_P1HW.sum(dim=(2, 3))


def dice_loss(logits_PTHW: Tensor, masks_PHW: Tensor, inside_PHW: Tensor) -> Tensor:
    """1 - dice coefficient of the probabilities, float32 (P, T) (arXiv 1606.04797, smoothed by 1 pixel)."""
    counted_P1HW = inside_PHW[:, None].to(logits_PTHW.dtype)
    probabilities_PTHW = torch.sigmoid(logits_PTHW) * counted_P1HW
    targets_P1HW = masks_PHW[:, None].to(logits_PTHW.dtype) * counted_P1HW
    shared_PT = (probabilities_PTHW * targets_P1HW).sum(dim=(2, 3))
    total_PT = probabilities_PTHW.sum(dim=(2, 3)) + targets_P1HW.sum(dim=(2, 3))
    return 1 - (2 * shared_PT + 1) / (total_PT + 1)


@torch.no_grad()
def mask_iou(logits_PTHW: Tensor, masks_PHW: Tensor, inside_PHW: Tensor) -> Tensor:
    """IoU of the masks above 0 with the true ones over the pixels that count, float32 (P, T); 1 for two empty."""
    answers_PTHW = (logits_PTHW > 0) & inside_PHW[:, None]
    truth_P1HW = (masks_PHW & inside_PHW)[:, None]
    shared_PT = (answers_PTHW & truth_P1HW).sum(dim=(2, 3))
    either_PT = (answers_PTHW | truth_P1HW).sum(dim=(2, 3))
    return torch.where(either_PT > 0, shared_PT / either_PT.clamp(min=1), 1.0)


def prompt_losses(
    logits_PTHW: Tensor, iou_PT: Tensor, masks_PHW: Tensor, inside_PHW: Tensor, weights: MaskLossWeights
) -> tuple[Tensor, Tensor]:
    """The loss of each prompt (P,) and the true IoU of its candidates (P, T), both float32.

    Of several candidates the best one's mask loss alone counts, so that an ambiguous prompt may have several answers;
    every candidate's predicted IoU is compared with its true one, since that is what chooses among them.
    """
    mask_PT = weights.focal * focal_loss(logits_PTHW, masks_PHW, inside_PHW)
    mask_PT = mask_PT + weights.dice * dice_loss(logits_PTHW, masks_PHW, inside_PHW)
    true_PT = mask_iou(logits_PTHW, masks_PHW, inside_PHW)
    iou_P = (iou_PT - true_PT).square().mean(dim=1)
    return mask_PT.amin(dim=1) + weights.iou * iou_P, true_PT
