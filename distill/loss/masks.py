"""What a predicted mask costs: focal and dice loss, and the error of its predicted IoU (SAM, appendix A).

Shape suffixes: P prompts, T candidate masks of each, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...sam.modeling.decode_prompts import Prompts, decode_prompts
from ...sam.modeling.head import SamHead
from .prompts import (
    BOX_NOISE_PIXELS,
    borders_to_square,
    correction_pixel,
    noisy_box,
    to_square,
    uniform_pixel,
)

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


# --- An embedding judged by the masks that SAM's head makes of it, over several rounds of prompts an object.
#
# Shape suffixes: B images, P prompts (one an object), T candidate masks, M the side in pixels of the masks compared.
#

LARGEST_MASK_SIDE = 256


def mask_side(image_size: int) -> int:
    """The side of the masks that are compared: half the encoder's square, 256 at most, which is what SAM's head gives
    at 1024."""
    return min(image_size // 2, LARGEST_MASK_SIDE)


@dataclass(frozen=True, kw_only=True)
class Objects:
    """P objects in B images, on one device.

    masks_PMM: bool, each object over its image's square.
    image_P: int64, which image of the batch it is in.
    inside_BMM: bool, where each square is image.
    weight_P: float32, what an object's loss counts, 0 for a place that has none.
    """

    masks_PMM: Tensor
    image_P: Tensor
    inside_BMM: Tensor
    weight_P: Tensor


@dataclass(frozen=True, kw_only=True)
class MaskTraining:
    """How masks are asked for and what they cost.

    `boxes` is the share of objects that are asked for by a box first, the others by a point. Then come `rounds` - 1
    corrections: a point from where the answer was wrong, with the answer as mask prompt. A single point is ambiguous:
    it is answered by SAM's three masks, of which the best counts, and by its single mask as well, which verify
    compares; whatever is more than a point is answered by the single mask.
    """

    rounds: int = 2
    boxes: float = 0.25
    weights: MaskLossWeights = field(default_factory=MaskLossWeights)

    def loss(
        self, head: SamHead, emb_BCHW: Tensor, objects: Objects, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The weighted sums over objects of their loss, averaged over rounds, and of the IoU that a first prompt's
        picked mask has: two float32 scalars, the first with gradients.

        `emb_BCHW` is float32 (B, 256, g, g); `generator` is on the CPU.
        """
        with_box_P = torch.rand(len(objects.image_P), generator=generator) < self.boxes
        loss, picked = emb_BCHW.new_zeros(()), emb_BCHW.new_zeros(())
        for wanted in (False, True):
            chosen = (with_box_P == wanted).nonzero()[:, 0].to(objects.image_P.device, non_blocking=True)
            if len(chosen):
                part = replace(
                    objects,
                    masks_PMM=objects.masks_PMM[chosen],
                    image_P=objects.image_P[chosen],
                    weight_P=objects.weight_P[chosen],
                )
                part_loss, part_picked = self._rounds(head, emb_BCHW, part, generator, by_box=wanted)
                loss, picked = loss + part_loss, picked + part_picked
        return loss, picked

    def _rounds(
        self, head: SamHead, emb_BCHW: Tensor, objects: Objects, generator: torch.Generator, *, by_box: bool
    ) -> tuple[Tensor, Tensor]:
        emb_PCHW, inside_PMM = _of_images(emb_BCHW, objects.image_P), objects.inside_BMM[objects.image_P]
        masks_PMM = objects.masks_PMM
        prompts = self._first(head.image_size, masks_PMM, generator, by_box=by_box)
        total, picked = emb_BCHW.new_zeros(()), emb_BCHW.new_zeros(())
        for round_ in range(self.rounds):
            logits_PThw, iou_PT = decode_prompts(head, emb_PCHW, prompts)
            ambiguous = round_ == 0 and not by_box
            asked = slice(None) if ambiguous else slice(0, 1)
            logits_PTMM = _enlarge(logits_PThw[:, asked], masks_PMM.shape[-1])
            single_P, true_PT = prompt_losses(
                logits_PTMM[:, :1], iou_PT[:, :1], masks_PMM, inside_PMM, self.weights
            )
            loss_P, best_P = single_P, torch.zeros_like(objects.image_P)
            if ambiguous:
                three_P, true_PT = prompt_losses(
                    logits_PTMM[:, 1:], iou_PT[:, 1:], masks_PMM, inside_PMM, self.weights
                )
                loss_P, best_P = (single_P + three_P) / 2, 1 + iou_PT[:, 1:].argmax(dim=1)
            total = total + (loss_P * objects.weight_P).sum()
            if round_ == 0:
                picked = (true_PT.gather(1, best_P[:, None] - int(ambiguous))[:, 0] * objects.weight_P).sum()
            if round_ + 1 < self.rounds:
                prompts = self._corrected(
                    head.image_size,
                    prompts,
                    logits_PThw,
                    logits_PTMM,
                    best_P,
                    masks_PMM,
                    inside_PMM,
                    generator,
                )
        return total / self.rounds, picked

    def _first(
        self, image_size: int, masks_PMM: Tensor, generator: torch.Generator, *, by_box: bool
    ) -> Prompts:
        side = masks_PMM.shape[-1]
        if by_box:
            box_P4 = noisy_box(masks_PMM, generator, BOX_NOISE_PIXELS * side / 1024)
            none = torch.zeros(len(masks_PMM), 0, 2, device=masks_PMM.device)
            return Prompts(
                points_PN2=none,
                labels_PN=none[..., 0].long(),
                boxes_P4=borders_to_square(box_P4, image_size, side),
            )
        points_P2 = to_square(uniform_pixel(masks_PMM, generator), image_size, side)
        labels_P1 = torch.ones(len(points_P2), 1, dtype=torch.long, device=masks_PMM.device)
        return Prompts(points_PN2=points_P2[:, None], labels_PN=labels_P1)

    def _corrected(
        self,
        image_size: int,
        prompts: Prompts,
        logits_PThw: Tensor,
        logits_PTMM: Tensor,
        best_P: Tensor,
        masks_PMM: Tensor,
        inside_PMM: Tensor,
        generator: torch.Generator,
    ) -> Prompts:
        """The prompts with a point more and the last answer as their mask; no gradient goes through either."""
        rows = torch.arange(len(best_P), device=best_P.device)
        answers_PMM = logits_PTMM.detach()[rows, best_P] > 0
        pixels_P2, labels_P = correction_pixel(masks_PMM, answers_PMM, inside_PMM, generator)
        points_P2 = to_square(pixels_P2, image_size, masks_PMM.shape[-1])
        return replace(
            prompts,
            points_PN2=torch.cat((prompts.points_PN2, points_P2[:, None]), dim=1),
            labels_PN=torch.cat((prompts.labels_PN, labels_P[:, None]), dim=1),
            masks_P1hw=logits_PThw.detach()[rows, best_P][:, None],
        )


def _of_images(emb_BCHW: Tensor, image_P: Tensor) -> Tensor:
    """The embedding of each prompt's image."""
    if emb_BCHW.device.type == "cpu":
        # Its backward pass takes 0.01 s for 16 prompts at 1024, an index's 0.3 s; on GPUs it isn't deterministic.
        return emb_BCHW.index_select(0, image_P)
    return emb_BCHW[image_P]


def _enlarge(logits_PThw: Tensor, side: int) -> Tensor:
    """Logits at the size at which masks are compared."""
    if logits_PThw.shape[-1] == side:
        return logits_PThw
    return F.interpolate(logits_PThw, (side, side), mode="bilinear", align_corners=False)
