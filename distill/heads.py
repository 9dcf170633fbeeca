"""SAM's heads as students need them: a store's, and one that was trained with a student."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..sam import CheckpointError
from ..sam.head import SamHead, build_head
from ..store import EmbeddingStore
from .errors import DistillError


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
