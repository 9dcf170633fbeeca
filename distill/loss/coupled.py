"""Objectives that compare masks: semi-coupled, coupled, decoder finetuning (MobileSAM, sections 3.2 and 3.3).

SAM's head decodes the student's embedding for prompts drawn at random. The target masks are the teacher's for the
same prompts, which the store's head decodes from the stored embedding, or those of annotations.

Shape suffixes: B images, C channels, H and W rows and columns of the embedding's grid, Q objects drawn of one image,
P prompts (one per object, B * Q of them), T mask tokens of a prompt (SAM's single mask, then its three), M side of
the masks compared, h and w rows and columns of low-resolution masks (4g), 2 (height, width), 1 one.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ...common.errors import CheckpointError, DistillError
from ...sam.modeling.decode_prompts import decode_prompts
from ...sam.modeling.head import SamHead, build_head
from ...store import EmbeddingStore
from ..config import DistillConfig
from ..data.labels import mask_side
from .base import BatchTotals, MicroBatch, Objective
from .decoupled import decoupled_loss
from .mask_prompts import point_prompts
from .masks import MaskLoss, MaskLossWeights, PromptedObjects, TeacherAnswers


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """Options of an objective that compares masks."""

    mask_loss: MaskLoss
    objects: int
    """Objects prompted per image and step; an image's loss is the mean over its objects, which may be fewer."""
    mse_weight: float
    """Weight of the decoupled loss added; 0 leaves it out."""
    region: str
    """Region of the decoupled loss: "all" or "valid"."""
    kind: str = "mse"
    """Kind of the decoupled loss, one of `recipe.LOSSES`."""
    teacher_answers: bool = True
    """Compare with the teacher's answers to the student's prompts; False: with the mask of the teacher's object."""

    @classmethod
    def from_config(cls, config: DistillConfig) -> Self:
        """Return the mask options of a configuration."""
        weights = MaskLossWeights(focal=config.focal_weight, dice=config.dice_weight, iou=config.iou_weight)
        return cls(
            mask_loss=MaskLoss(rounds=config.rounds, boxes=config.boxes, weights=weights),
            objects=config.objects,
            mse_weight=config.mse_weight,
            region=config.resolved_recipe.loss_region,
            kind=config.resolved_recipe.loss,
            teacher_answers=config.resolved_recipe.teacher_answers,
        )


class MaskObjective(Objective):
    """Base of the objectives that compare masks; the subclasses differ in the weights that they train.

    Args:
        teacher_head: the store's head on the device, frozen; it decodes the teacher's masks.
        options: weights and counts of the mask loss.
    """

    def __init__(self, teacher_head: SamHead, options: MaskOptions) -> None:
        self.teacher_head = teacher_head
        self.options = options

    @classmethod
    def from_config(cls, config: DistillConfig, store: EmbeddingStore, device: torch.device) -> Self:
        """See `Objective.from_config`."""
        if store.spec.head_sha256 is None:
            raise DistillError(
                f"{store.path} has no mask head, which the objective {config.objective} needs: its teacher "
                f"{store.spec.teacher} gave none; use --objective decoupled"
            )
        if not store.head_path.exists():
            raise DistillError(
                f"{store.path} has no mask decoder, which the objective {config.objective} needs: "
                "precompute it again"
            )
        return cls(store_head(store, device), MaskOptions.from_config(config))

    def loss(self, micro_batch: MicroBatch, totals: BatchTotals) -> Tensor:
        """Compute mask loss and weighted embedding MSE. See `Objective.loss`."""
        options = self.options
        head = self.teacher_head if self.head is None else self.head
        student_BCHW = micro_batch.student_BCHW
        with torch.autocast(student_BCHW.device.type, enabled=False):
            objects = batch_objects(self.teacher_head, micro_batch, options.objects)
            teacher = (
                TeacherAnswers(head=self.teacher_head, emb_BCHW=micro_batch.teacher_BCHW)
                if options.teacher_answers
                else None
            )
            mask_loss, _ = options.mask_loss(head, student_BCHW, objects, micro_batch.generator, teacher)
        loss = mask_loss / totals.images
        if options.mse_weight:
            mse = decoupled_loss(
                student_BCHW,
                micro_batch.teacher_BCHW,
                micro_batch.valid_BHW,
                totals,
                region=options.region,
                kind=options.kind,
            )
            loss = loss + options.mse_weight * mse
        return loss


class SemiCoupled(MaskObjective):
    """Objective that trains the student alone, through a frozen head."""


class Coupled(MaskObjective):
    """Objective that trains student and head together."""

    def __init__(self, teacher_head: SamHead, options: MaskOptions) -> None:
        super().__init__(teacher_head, options)
        self.head = trainable_head(teacher_head)


class DecoderFinetuning(Coupled):
    """Objective that trains the head alone, for a finished student."""

    trains_encoder = False


def batch_objects(teacher_head: SamHead, micro_batch: MicroBatch, count: int) -> PromptedObjects:
    """Return `count` objects per image: from its annotations where it has them, else from the teacher.

    If an image has fewer, the remaining places are empty with weight 0; an image's weights add up to 1.

    Args:
        teacher_head: the store's head, on the device of the micro-batch.
        micro_batch: embeddings and annotated objects; its generator draws the points for the teacher's masks.
        count: objects per image, Q; with annotations, the loader's Q.

    Returns:
        B * Q objects; those of one image are adjacent.
    """
    device = micro_batch.teacher_BCHW.device
    side = mask_side(teacher_head.image_size)
    sizes_B2 = micro_batch.sizes_B2.to(device, non_blocking=True)
    valid_BMM = valid_pixels(sizes_B2, teacher_head.image_size, side)
    image_P = torch.arange(len(sizes_B2), device=device).repeat_interleave(count)
    annotated = micro_batch.objects
    # annotated_B is on the CPU, so that a test of it doesn't synchronise with a GPU.
    annotated_B = torch.zeros(len(sizes_B2), dtype=torch.bool) if annotated is None else annotated.annotated_B
    if annotated is not None and bool(annotated_B.all()):
        masks_PMM = annotated.masks_BQMM.flatten(0, 1) & valid_BMM[image_P]
    else:
        emb_PCHW, valid_PMM = micro_batch.teacher_BCHW[image_P], valid_BMM[image_P]
        masks_PMM = teacher_masks(teacher_head, emb_PCHW, valid_PMM, micro_batch.generator)
        if annotated is not None:
            own_P = annotated_B.to(device, non_blocking=True)[image_P]
            own_PMM = annotated.masks_BQMM.flatten(0, 1) & valid_PMM
            masks_PMM = torch.where(own_P[:, None, None], own_PMM, masks_PMM)
    known_BQ = masks_PMM.flatten(1).any(dim=1).view(-1, count)
    weight_BQ = known_BQ / known_BQ.sum(dim=1, keepdim=True).clamp(min=1)
    return PromptedObjects(
        masks_PMM=masks_PMM,
        image_P=image_P,
        valid_BMM=valid_BMM,
        weight_P=weight_BQ.flatten(),
        labelled_P=annotated_B.repeat_interleave(count),
    )


@torch.no_grad()
def teacher_masks(head: SamHead, emb_PCHW: Tensor, valid_PMM: Tensor, generator: torch.Generator) -> Tensor:
    """Decode the teacher's mask for one random point per prompt, drawn uniformly from the image's pixels.

    Of SAM's three masks, the one with the highest predicted IoU is chosen.

    Args:
        head: the teacher's head, on the device of the embeddings.
        emb_PCHW: float32 (P, 256, g, g), the stored embedding of each prompt's image.
        valid_PMM: bool (P, M, M), True for pixels of the image, not of the padding.
        generator: generator on the CPU.

    Returns:
        bool (P, M, M) over the encoder's square; empty where the teacher finds no object at the point.
    """
    side = valid_PMM.shape[-1]
    prompts = point_prompts(valid_PMM, head.image_size, generator)
    logits_PThw, iou_PT = decode_prompts(head, emb_PCHW, prompts)
    rows = torch.arange(len(logits_PThw), device=logits_PThw.device)
    logits_P1hw = logits_PThw[rows, 1 + iou_PT[:, 1:].argmax(dim=1)][:, None]
    logits_PMM = F.interpolate(logits_P1hw, (side, side), mode="bilinear", align_corners=False)[:, 0]
    return (logits_PMM > 0) & valid_PMM


def valid_pixels(sizes_B2: Tensor, image_size: int, side: int) -> Tensor:
    """Return a mask of the pixels whose centre lies in the image, not in the padding of the encoder's square.

    `valid_cells` does the same for the embedding's grid. The first row and column are always valid.

    Args:
        sizes_B2: int64 (B, 2), height and width in pixels of each image in the encoder's square.
        image_size: side of the encoder's square in pixels.
        side: side of the mask in pixels, M.

    Returns:
        bool (B, M, M), on the device of `sizes_B2`.
    """
    centres_M = (torch.arange(side, device=sizes_B2.device) + 0.5) * (image_size / side)
    rows_BM, columns_BM = centres_M < sizes_B2[:, :1], centres_M < sizes_B2[:, 1:]
    rows_BM[:, 0] = columns_BM[:, 0] = True
    return rows_BM[:, :, None] & columns_BM[:, None, :]


def store_head(store: EmbeddingStore, device: torch.device) -> SamHead:
    """Return the store's prompt encoder and mask decoder, float32, frozen.

    Args:
        store: open for reading.
        device: device of the head.

    Raises:
        StoreDamaged: the file is not what was stored.
        DistillError: it isn't a SAM head, or holds values that aren't finite.
    """
    try:
        state = {key: value.float() for key, value in load(store.read_head()).items()}
        head = build_head(state, store.spec.image_size)
    except (CheckpointError, SafetensorError) as error:
        raise DistillError(f"{store.head_path} is not a SAM head ({str(error)[:100]})") from error
    broken = next((key for key, value in state.items() if not bool(torch.isfinite(value).all())), None)
    if broken is not None:
        raise DistillError(f"{store.head_path} holds values that aren't finite, in {broken}")
    return head.to(device)


def trainable_head(head: SamHead) -> SamHead:
    """Return a copy of a head with trainable parameters."""
    return deepcopy(head).requires_grad_(True)


def head_state(head: SamHead) -> dict[str, Tensor]:
    """Return a head's tensors on the CPU, keyed as in SAM's checkpoints."""
    return {key: value.detach().cpu().contiguous() for key, value in head.state_dict().items()}
