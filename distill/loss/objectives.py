"""SAM's heads as students need them: a store's, and one that was trained with a student."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ...common.errors import DistillError
from ...sam import CheckpointError
from ...sam.modeling.decode_prompts import Prompts, decode_prompts
from ...sam.modeling.head import SamHead, build_head
from ...store import EmbeddingStore
from ..config import DistillConfig
from .base import Decoupled, Objective, Part, WholeBatch, decoupled_loss
from .masks import MaskLossWeights, MaskTraining, Objects, mask_side
from .prompts import to_square, uniform_pixel


def store_head(store: EmbeddingStore, device: torch.device) -> SamHead:
    """The store's prompt encoder and mask decoder on `device`, frozen.

    Raises StoreDamaged when the file is not what was stored, DistillError when it isn't a SAM head.
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


def head_state(head: SamHead) -> dict[str, Tensor]:
    """A head's tensors on the CPU, keyed as in SAM's checkpoints."""
    return {key: value.detach().cpu().contiguous() for key, value in head.state_dict().items()}


# --- The objectives that look at masks: SAM's head makes them of the student's embedding, for prompts drawn at
# random.
#
# The objects are the teacher's, which the store's head makes of the stored embedding, or those of annotations.
# Source: MobileSAM (arXiv 2306.14289), sections 3.2 and 3.3.
#


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """`objects` of each image are asked for in a step; an image's loss is the mean over those that it has. `mse`
    weighs the decoupled loss that is added, of `region`."""

    training: MaskTraining
    objects: int
    mse: float
    region: str


class MaskObjective(Objective):
    """Masks against masks; its kinds differ in what is trained. `teacher_head` is the store's, frozen."""

    def __init__(self, teacher_head: SamHead, options: MaskOptions) -> None:
        self.teacher_head = teacher_head
        self.options = options

    def loss(self, part: Part, whole: WholeBatch) -> Tensor:
        options = self.options
        head = self.teacher_head if self.head is None else self.head
        with torch.autocast(part.student_BCHW.device.type, enabled=False):
            objects = batch_objects(self.teacher_head, part, options.objects)
            masks, _ = options.training.loss(head, part.student_BCHW, objects, part.generator)
        loss = masks / whole.images
        if options.mse:
            mse = decoupled_loss(
                part.student_BCHW, part.teacher_BCHW, part.valid_BHW, whole.elements, options.region
            )
            loss = loss + options.mse * mse
        return loss


class SemiCoupled(MaskObjective):
    """The student alone is trained, through a head that stays as it is."""


class Coupled(MaskObjective):
    """Student and head are trained together."""

    def __init__(self, teacher_head: SamHead, options: MaskOptions) -> None:
        super().__init__(teacher_head, options)
        self.head = trainable(teacher_head)


class DecoderFinetuning(Coupled):
    """The head alone is trained, for a student that is finished."""

    trains_encoder = False


def trainable(head: SamHead) -> SamHead:
    """A copy of a head whose parameters take gradients."""
    return deepcopy(head).requires_grad_(True)


def inside_square(sizes_B2: Tensor, image_size: int, side: int) -> Tensor:
    """Where the images are, in masks of `side` x `side` over the encoder's square: bool (B, side, side)."""
    centres = (torch.arange(side, device=sizes_B2.device) + 0.5) * (image_size / side)
    rows, columns = centres < sizes_B2[:, :1], centres < sizes_B2[:, 1:]
    rows[:, 0] = columns[:, 0] = True
    return rows[:, :, None] & columns[:, None, :]


def batch_objects(teacher_head: SamHead, part: Part, count: int) -> Objects:
    """`count` objects of each image: those of its annotations where it has them, else the teacher's.

    Where there are fewer, places are left without an object, and weigh nothing; those of an image that has any weigh
    1 together.
    """
    device = part.teacher_BCHW.device
    side = mask_side(teacher_head.image_size)
    sizes_B2 = part.sizes_B2.to(device, non_blocking=True)
    inside_BMM = inside_square(sizes_B2, teacher_head.image_size, side)
    image_P = torch.arange(len(sizes_B2), device=device).repeat_interleave(count)
    labelled = part.objects
    # On the CPU, so that a GPU isn't waited for.
    if labelled is not None and bool(labelled.annotated_B.all()):
        masks_PMM = labelled.masks_BKMM.flatten(0, 1) & inside_BMM[image_P]
    else:
        emb_PCHW, inside_PMM = part.teacher_BCHW[image_P], inside_BMM[image_P]
        masks_PMM = teacher_masks(teacher_head, emb_PCHW, inside_PMM, part.generator)
        if labelled is not None:
            own_P = labelled.annotated_B.to(device, non_blocking=True)[image_P]
            own_PMM = labelled.masks_BKMM.flatten(0, 1) & inside_PMM
            masks_PMM = torch.where(own_P[:, None, None], own_PMM, masks_PMM)
    known_BK = masks_PMM.flatten(1).any(dim=1).view(-1, count)
    weight_BK = known_BK / known_BK.sum(dim=1, keepdim=True).clamp(min=1)
    return Objects(masks_PMM=masks_PMM, image_P=image_P, inside_BMM=inside_BMM, weight_P=weight_BK.flatten())


@torch.no_grad()
def teacher_masks(head: SamHead, emb_PCHW: Tensor, inside_PMM: Tensor, generator: torch.Generator) -> Tensor:
    """What the teacher sees at a point of each image, drawn evenly: bool (P, M, M), empty where it sees nothing.

    Of SAM's three masks it is the one that the head itself trusts most.
    """
    side = inside_PMM.shape[-1]
    points_P2 = to_square(uniform_pixel(inside_PMM, generator), head.image_size, side)
    labels_P1 = torch.ones(len(points_P2), 1, dtype=torch.long, device=points_P2.device)
    prompts = Prompts(points_PN2=points_P2[:, None], labels_PN=labels_P1)
    logits_PThw, iou_PT = decode_prompts(head, emb_PCHW, prompts)
    rows = torch.arange(len(points_P2), device=points_P2.device)
    logits_P1hw = logits_PThw[rows, 1 + iou_PT[:, 1:].argmax(dim=1)][:, None]
    logits_PMM = F.interpolate(logits_P1hw, (side, side), mode="bilinear", align_corners=False)[:, 0]
    return (logits_PMM > 0) & inside_PMM


# --- The objectives by name.

MASK_OBJECTIVES: Mapping[str, type[MaskObjective]] = MappingProxyType(
    {"semi_coupled": SemiCoupled, "coupled": Coupled, "decoder": DecoderFinetuning}
)


def build_objective(config: DistillConfig, store: EmbeddingStore, device: torch.device) -> Objective:
    """The objective that `config` asks for, its heads on `device`.

    Raises DistillError or StoreDamaged where it needs the store's head and that can't be used.
    """
    if config.objective == "decoupled":
        return Decoupled(config.loss_region)
    if not store.head_path.exists():
        raise DistillError(
            f"{store.path} has no mask decoder, which the objective {config.objective} needs: precompute it again"
        )
    return MASK_OBJECTIVES[config.objective](store_head(store, device), mask_options(config))


def mask_options(config: DistillConfig) -> MaskOptions:
    """What a configuration says of masks."""
    weights = MaskLossWeights(focal=config.focal_weight, dice=config.dice_weight, iou=config.iou_weight)
    return MaskOptions(
        training=MaskTraining(rounds=config.rounds, boxes=config.boxes, weights=weights),
        objects=config.objects,
        mse=config.mse_weight,
        region=config.loss_region,
    )
