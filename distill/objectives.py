"""The objectives by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from ..store import EmbeddingStore
from .config import DistillConfig
from .decoupled import Decoupled
from .errors import DistillError
from .heads import store_head
from .mask_loss import MaskLossWeights
from .mask_objectives import Coupled, DecoderFinetuning, MaskObjective, MaskOptions, SemiCoupled
from .mask_training import MaskTraining
from .objective import Objective

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
