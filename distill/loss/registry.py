"""Registry of training objectives, by the names that `--objective` takes.

To add one, write a subclass of `Objective` (base.py), enter it here, and add its name to `OBJECTIVES` of
`distill/config.py`, a second list that serves to check options and print the help without loading torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from ...store import EmbeddingStore
from ..config import DistillConfig
from .base import Objective
from .coupled import Coupled, DecoderFinetuning, SemiCoupled
from .decoupled import Decoupled

OBJECTIVES: Mapping[str, type[Objective]] = MappingProxyType(
    {
        "decoupled": Decoupled,
        "semi_coupled": SemiCoupled,
        "coupled": Coupled,
        "decoder": DecoderFinetuning,
    }
)


def build_objective(config: DistillConfig, store: EmbeddingStore, device: torch.device) -> Objective:
    """Return the objective that `config` names.

    Args:
        config: options of the run.
        store: store with SAM's head, which the objectives that compare masks need.
        device: device of the heads.

    Raises:
        DistillError: the objective needs the store's head, which is missing or isn't a SAM head.
        StoreDamaged: the store's head is not what was stored.
    """
    return OBJECTIVES[config.objective].from_config(config, store, device)
