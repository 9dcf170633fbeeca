"""Checkpoints in the official format, with random values, written by segment_anything's own classes."""

from __future__ import annotations

from pathlib import Path

import torch
from segment_anything import sam_model_registry
from torch import Tensor


def write_checkpoint(name: str, path: Path) -> dict[str, Tensor]:
    """Save a random `vit_h`, `vit_l` or `vit_b` and return its state.

    Position tables, which are zeros until trained, get random values so that they have an effect.
    """
    torch.manual_seed(1)
    state = sam_model_registry[name]().state_dict()
    for key, value in state.items():
        if "pos_embed" in key or "rel_pos" in key:
            value.normal_(0, 0.2)
    torch.save(state, path)
    return state
