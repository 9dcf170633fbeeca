"""Mask loss: focal, dice and predicted-IoU loss over several rounds of prompts per object (SAM, appendix A).

Shape suffixes: B images, C channels, H and W rows and columns of the embedding's grid or of a mask, P prompts (one
per object), p some of them, T mask tokens of a prompt (SAM's single mask, then its three), M side of the masks
compared, h and w rows and columns of low-resolution masks (4g), 1 one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...sam.modeling.decode_prompts import Prompts, decode_prompts
from ...sam.modeling.head import SamHead
from .mask_prompts import box_prompts, corrected_prompts, point_prompts

FOCAL_ALPHA = 0.25


@dataclass(frozen=True, kw_only=True)
class MaskLossWeights:
    """Weights of the loss terms; the defaults are those of SAM's training (appendix A)."""

    focal: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    """Weight of the squared error of the predicted IoU."""


@dataclass(frozen=True, kw_only=True)
class PromptedObjects:
    """P objects to prompt for in B images, on one device."""

    masks_PMM: Tensor
    """bool (P, M, M), each object's mask over the encoder's square."""
    image_P: Tensor
    """int64 (P,), index of the object's image in the batch."""
    valid_BMM: Tensor
    """bool (B, M, M), True for pixels of the image, not of the padding."""
    weight_P: Tensor
    """float32 (P,), weight of an object's loss; 0 for a place without an object."""
    labelled_P: Tensor | None = None
    """bool (P,) on the CPU, True for an annotation's mask, False for one that the teacher drew; None: all True."""

    def take(self, chosen_p: Tensor) -> PromptedObjects:
        """Return the objects of these indices (int64, on the CPU), in the same images."""
        there_p = chosen_p.to(self.image_P.device, non_blocking=True)
        return replace(
            self,
            masks_PMM=self.masks_PMM[there_p],
            image_P=self.image_P[there_p],
            weight_P=self.weight_P[there_p],
            labelled_P=None if self.labelled_P is None else self.labelled_P[chosen_p],
        )


@dataclass(frozen=True, kw_only=True)
class TeacherAnswers:
    """Teacher that answers the prompts that its student gets."""

    head: SamHead
    """The teacher's head, frozen."""
    emb_BCHW: Tensor
    """float32 (B, 256, g, g), the stored embeddings."""


@dataclass(frozen=True, kw_only=True)
class MaskLoss:
    """Loss of the masks that SAM's head predicts from an embedding, for prompts about known objects.

    An object's first prompt is a box or a point. Each further round adds a point drawn from the error region of the
    predicted mask, with that mask as mask prompt. A single point is ambiguous: SAM's three masks and its single mask,
    which verify compares, are all trained. For every other prompt the single mask is used.

    An object is compared with its mask: of the three masks the best counts, and their loss is averaged with the
    single mask's. With `TeacherAnswers`, objects that no annotation labels only say where to prompt: each of the
    student's masks, and its predicted IoU, is compared with the teacher's for the same prompt. The teacher's masks
    for two points of an object often differ, so that it would be far from the minimum otherwise (docs/TWO_STAGES.md).
    """

    rounds: int = 2
    """Prompts per object."""
    boxes: float = 0.25
    """Probability that an object's first prompt is a box, 0 to 1."""
    weights: MaskLossWeights = field(default_factory=MaskLossWeights)

    def __call__(
        self,
        head: SamHead,
        emb_BCHW: Tensor,
        objects: PromptedObjects,
        generator: torch.Generator,
        teacher: TeacherAnswers | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss of a micro-batch.

        Args:
            head: SAM's head, on the device of the embedding.
            emb_BCHW: float32 (B, 256, g, g).
            objects: objects in these images.
            generator: generator on the CPU.
            teacher: compare unlabelled objects with the teacher's answers to the same prompts; None: all with their
                masks.

        Returns:
            Two float32 scalars, weighted sums over objects: the loss, averaged over rounds, with gradients; and the
            IoU with the target of the mask with the highest predicted IoU for the first prompt (with the teacher's
            answers: the IoU that the teacher predicts).
        """
        by_box_P = torch.rand(len(objects.image_P), generator=generator) < self.boxes
        loss, picked = emb_BCHW.new_zeros(()), emb_BCHW.new_zeros(())
        for by_box, answered, chosen_p in _alike(by_box_P, objects.labelled_P, answers=teacher is not None):
            some_loss, some_picked = self._prompt_rounds(
                head,
                emb_BCHW,
                objects.take(chosen_p),
                generator,
                teacher if answered else None,
                by_box=by_box,
            )
            loss, picked = loss + some_loss, picked + some_picked
        return loss, picked

    def _prompt_rounds(
        self,
        head: SamHead,
        emb_BCHW: Tensor,
        objects: PromptedObjects,
        generator: torch.Generator,
        teacher: TeacherAnswers | None,
        *,
        by_box: bool,
    ) -> tuple[Tensor, Tensor]:
        """Compute the results of `__call__` for objects whose first prompts are all boxes, or all points."""
        emb_PCHW = _select_images(emb_BCHW, objects.image_P)
        masks_PMM, valid_PMM = objects.masks_PMM, objects.valid_BMM[objects.image_P]
        first_prompts = box_prompts if by_box else point_prompts
        prompts = first_prompts(masks_PMM, head.image_size, generator)
        total, picked = emb_BCHW.new_zeros(()), emb_BCHW.new_zeros(())
        rows = torch.arange(len(masks_PMM), device=masks_PMM.device)
        for round_ in range(self.rounds):
            logits_PThw, iou_PT = decode_prompts(head, emb_PCHW, prompts)
            ambiguous = round_ == 0 and not by_box
            tokens = slice(None) if ambiguous else slice(0, 1)
            logits_PTMM = _enlarge(logits_PThw[:, tokens], masks_PMM.shape[-1])
            if teacher is None:
                loss_P, best_P, best_iou_P = self._answer_losses(
                    logits_PTMM, iou_PT[:, tokens], masks_PMM, valid_PMM
                )
            else:
                target_PTMM, target_iou_PT = _teacher_answers(
                    teacher, objects.image_P, prompts, tokens, masks_PMM.shape[-1]
                )
                loss_P = token_losses(
                    logits_PTMM, iou_PT[:, tokens], target_PTMM, target_iou_PT, valid_PMM, self.weights
                )
                best_P, best_iou_P = _best_token(target_iou_PT)
                masks_PMM = target_PTMM[rows, best_P] > 0
            total = total + (loss_P * objects.weight_P).sum()
            if round_ == 0:
                picked = (best_iou_P * objects.weight_P).sum()
            if round_ + 1 < self.rounds:
                # Prompts take no gradient.
                answers_PMM = logits_PTMM.detach()[rows, best_P] > 0
                answers_P1hw = logits_PThw.detach()[rows, best_P][:, None]
                prompts = corrected_prompts(
                    prompts, masks_PMM, answers_PMM, answers_P1hw, valid_PMM, head.image_size, generator
                )
        return total / self.rounds, picked

    def _answer_losses(
        self, logits_PTMM: Tensor, iou_PT: Tensor, masks_PMM: Tensor, valid_PMM: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return each prompt's loss, the token with the highest predicted IoU (int64), and its true IoU, (P,) each.

        T is 1 or 4. With 4 the loss is the mean of the single mask's and of the three masks'.
        """
        single_P, true_PT = prompt_losses(
            logits_PTMM[:, :1], iou_PT[:, :1], masks_PMM, valid_PMM, self.weights
        )
        if iou_PT.shape[1] == 1:
            return single_P, torch.zeros_like(single_P, dtype=torch.long), true_PT[:, 0]
        three_P, true_PT = prompt_losses(
            logits_PTMM[:, 1:], iou_PT[:, 1:], masks_PMM, valid_PMM, self.weights
        )
        best_P, _ = _best_token(iou_PT)
        return (single_P + three_P) / 2, best_P, true_PT.gather(1, best_P[:, None] - 1)[:, 0]


def token_losses(
    logits_PTHW: Tensor,
    iou_PT: Tensor,
    target_logits_PTHW: Tensor,
    target_iou_PT: Tensor,
    valid_PHW: Tensor,
    weights: MaskLossWeights,
) -> Tensor:
    """Return the loss of each prompt's masks against the teacher's of the same tokens, averaged over tokens.

    It is 0 where student and teacher are equal, and nowhere less: the focal loss is that of soft targets (arXiv
    2006.04388, beta 2), and dice has squares in its denominator (arXiv 1606.04797).

    Args:
        logits_PTHW: float (P, T, H, W), mask logits.
        iou_PT: float (P, T), predicted IoUs.
        target_logits_PTHW: float (P, T, H, W), the teacher's mask logits.
        target_iou_PT: float (P, T), the teacher's predicted IoUs.
        valid_PHW: bool (P, H, W), pixels that count.
        weights: weights of the terms.

    Returns:
        (P,) in the dtype of the logits, with gradients.
    """
    counted_P1HW = valid_PHW[:, None].to(logits_PTHW.dtype)
    student_PTHW, teacher_PTHW = torch.sigmoid(logits_PTHW), torch.sigmoid(target_logits_PTHW)
    cross_PTHW = F.binary_cross_entropy_with_logits(logits_PTHW, teacher_PTHW, reduction="none")
    focal_PTHW = (student_PTHW - teacher_PTHW).square() * cross_PTHW * counted_P1HW
    focal_PT = focal_PTHW.sum(dim=(2, 3)) / counted_P1HW.sum(dim=(2, 3))
    shared_PT = (student_PTHW * teacher_PTHW * counted_P1HW).sum(dim=(2, 3))
    squares_PT = ((student_PTHW.square() + teacher_PTHW.square()) * counted_P1HW).sum(dim=(2, 3))
    dice_PT = 1 - (2 * shared_PT + 1) / (squares_PT + 1)
    iou_PT = (iou_PT - target_iou_PT).square()
    return (weights.focal * focal_PT + weights.dice * dice_PT + weights.iou * iou_PT).mean(dim=1)


def prompt_losses(
    logits_PTHW: Tensor, iou_PT: Tensor, masks_PHW: Tensor, valid_PHW: Tensor, weights: MaskLossWeights
) -> tuple[Tensor, Tensor]:
    """Return the loss of each prompt and the true IoU of its candidate masks.

    Only the mask loss of the best candidate counts, so that the candidates of an ambiguous prompt may differ. The IoU
    term averages over all candidates, since the predicted IoUs choose among them.

    Args:
        logits_PTHW: float (P, T, H, W), mask logits.
        iou_PT: float (P, T), predicted IoUs.
        masks_PHW: bool (P, H, W), target masks.
        valid_PHW: bool (P, H, W), pixels that count.
        weights: weights of the terms.

    Returns:
        Losses (P,) in the dtype of the logits, with gradients; true IoUs, float32 (P, T), without.
    """
    mask_PT = weights.focal * focal_loss(logits_PTHW, masks_PHW, valid_PHW)
    mask_PT = mask_PT + weights.dice * dice_loss(logits_PTHW, masks_PHW, valid_PHW)
    true_PT = mask_iou(logits_PTHW, masks_PHW, valid_PHW)
    iou_P = (iou_PT - true_PT).square().mean(dim=1)
    return mask_PT.amin(dim=1) + weights.iou * iou_P, true_PT


def focal_loss(logits_PTHW: Tensor, masks_PHW: Tensor, valid_PHW: Tensor) -> Tensor:
    """Return the mean focal loss over the pixels that count (arXiv 1708.02002, alpha 0.25 and gamma 2).

    Args:
        logits_PTHW: float (P, T, H, W), mask logits.
        masks_PHW: bool (P, H, W), target masks.
        valid_PHW: bool (P, H, W), pixels that count.

    Returns:
        (P, T) in the dtype of the logits, with gradients.
    """
    targets_P1HW = masks_PHW[:, None].to(logits_PTHW.dtype)
    # z is the logit of the true class: cross entropy is softplus(-z), and 1 - p is sigmoid(-z).
    right_PTHW = logits_PTHW * (2 * targets_P1HW - 1)
    cross_PTHW = F.softplus(-right_PTHW)
    alpha_P1HW = (1 - FOCAL_ALPHA) + (2 * FOCAL_ALPHA - 1) * targets_P1HW
    # The exponent 2 is gamma.
    loss_PTHW = alpha_P1HW * torch.sigmoid(-right_PTHW).square() * cross_PTHW
    counted_P1HW = valid_PHW[:, None].to(loss_PTHW.dtype)
    return (loss_PTHW * counted_P1HW).sum(dim=(2, 3)) / counted_P1HW.sum(dim=(2, 3))


def dice_loss(logits_PTHW: Tensor, masks_PHW: Tensor, valid_PHW: Tensor) -> Tensor:
    """Return 1 - dice coefficient of the probabilities (arXiv 1606.04797, smoothed by 1 pixel).

    Args:
        logits_PTHW: float (P, T, H, W), mask logits.
        masks_PHW: bool (P, H, W), target masks.
        valid_PHW: bool (P, H, W), pixels that count.

    Returns:
        (P, T) in the dtype of the logits, with gradients.
    """
    counted_P1HW = valid_PHW[:, None].to(logits_PTHW.dtype)
    probabilities_PTHW = torch.sigmoid(logits_PTHW) * counted_P1HW
    targets_P1HW = masks_PHW[:, None].to(logits_PTHW.dtype) * counted_P1HW
    shared_PT = (probabilities_PTHW * targets_P1HW).sum(dim=(2, 3))
    total_PT = probabilities_PTHW.sum(dim=(2, 3)) + targets_P1HW.sum(dim=(2, 3))
    return 1 - (2 * shared_PT + 1) / (total_PT + 1)


@torch.no_grad()
def mask_iou(logits_PTHW: Tensor, masks_PHW: Tensor, valid_PHW: Tensor) -> Tensor:
    """Return the IoU of the masks (logits above 0) with the targets.

    Args:
        logits_PTHW: float (P, T, H, W), mask logits.
        masks_PHW: bool (P, H, W), target masks.
        valid_PHW: bool (P, H, W), pixels that count.

    Returns:
        float32 (P, T); 1 for two empty masks.
    """
    answers_PTHW = (logits_PTHW > 0) & valid_PHW[:, None]
    truth_P1HW = (masks_PHW & valid_PHW)[:, None]
    shared_PT = (answers_PTHW & truth_P1HW).sum(dim=(2, 3))
    either_PT = (answers_PTHW | truth_P1HW).sum(dim=(2, 3))
    return torch.where(either_PT > 0, shared_PT / either_PT.clamp(min=1), 1.0)


def _alike(
    by_box_P: Tensor, labelled_P: Tensor | None, *, answers: bool
) -> Iterator[tuple[bool, bool, Tensor]]:
    """Yield groups of objects treated alike: if prompts are boxes, if the teacher answers, indices (int64, CPU)."""
    answered_P = torch.zeros_like(by_box_P) if labelled_P is None or not answers else ~labelled_P
    for by_box in (False, True):
        for answered in (False, True):
            chosen_p = ((by_box_P == by_box) & (answered_P == answered)).nonzero()[:, 0]
            if len(chosen_p):
                yield by_box, answered, chosen_p


@torch.no_grad()
def _teacher_answers(
    teacher: TeacherAnswers, image_P: Tensor, prompts: Prompts, tokens: slice, side: int
) -> tuple[Tensor, Tensor]:
    """Return the teacher's mask logits for prompts, (P, T, side, side), and its predicted IoUs (P, T)."""
    emb_PCHW = _select_images(teacher.emb_BCHW, image_P)
    logits_PThw, iou_PT = decode_prompts(teacher.head, emb_PCHW, prompts)
    return _enlarge(logits_PThw[:, tokens], side), iou_PT[:, tokens]


def _best_token(iou_PT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token (int64) and value of the highest predicted IoU of SAM's three masks, or the single mask's."""
    if iou_PT.shape[1] == 1:
        return torch.zeros(len(iou_PT), dtype=torch.long, device=iou_PT.device), iou_PT[:, 0]
    best = iou_PT[:, 1:].max(dim=1)
    return 1 + best.indices, best.values


def _select_images(emb_BCHW: Tensor, image_P: Tensor) -> Tensor:
    """Return the embedding of each prompt's image, (P, C, H, W)."""
    if emb_BCHW.device.type == "cpu":
        # The backward pass of index_select takes 0.01 s for 16 prompts at 1024, that of indexing 0.3 s; but on GPUs
        # index_select isn't deterministic.
        return emb_BCHW.index_select(0, image_P)
    return emb_BCHW[image_P]


def _enlarge(logits_PThw: Tensor, side: int) -> Tensor:
    """Resize logits to the size at which masks are compared, (P, T, side, side)."""
    if logits_PThw.shape[-1] == side:
        return logits_PThw
    return F.interpolate(logits_PThw, (side, side), mode="bilinear", align_corners=False)
