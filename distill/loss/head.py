"""SAM's head (prompt encoder and mask decoder) in training: loaded from a store, copied to be trained, saved."""

from __future__ import annotations

from copy import deepcopy

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ...common.errors import CheckpointError, DistillError
from ...sam.modeling.head import SamHead, build_head
from ...store import EmbeddingStore


def store_head(store: EmbeddingStore, device: torch.device) -> SamHead:
    """Return the store's prompt encoder and mask decoder on `device`, float32, frozen.

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
    """Return a copy of a head whose parameters take gradients."""
    return deepcopy(head).requires_grad_(True)


def head_state(head: SamHead) -> dict[str, Tensor]:
    """Return a head's tensors on the CPU, keyed as in SAM's checkpoints."""
    return {key: value.detach().cpu().contiguous() for key, value in head.state_dict().items()}
