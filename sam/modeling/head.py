"""SAM's head: prompt encoder and mask decoder, the same in every SAM and in MobileSAM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn

from ...common.errors import CheckpointError
from ..photos.preprocess import PIXEL_MEAN, PIXEL_STD
from .neck import EMBEDDING_CHANNELS


class SamHead(nn.Module):
    """Prompt encoder and mask decoder, with the parameter names of SAM's checkpoints.

    Args:
        image_size: side in pixels of the encoder's square, which prompts' coordinates refer to; a multiple of 16.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        grid = image_size // 16
        self.image_size = image_size
        self.prompt_encoder = PromptEncoder(
            embed_dim=EMBEDDING_CHANNELS,
            image_embedding_size=(grid, grid),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        )
        self.mask_decoder = MaskDecoder(**sam_mask_decoder_sizes())


def sam_mask_decoder_sizes() -> dict[str, Any]:
    """Return the arguments of segment_anything's MaskDecoder, its transformer built."""
    return {
        "num_multimask_outputs": 3,
        "transformer": TwoWayTransformer(
            depth=2, embedding_dim=EMBEDDING_CHANNELS, mlp_dim=2048, num_heads=8
        ),
        "transformer_dim": EMBEDDING_CHANNELS,
        "iou_head_depth": 3,
        "iou_head_hidden_dim": 256,
    }


def build_head(state: Mapping[str, Tensor], image_size: int = 1024) -> SamHead:
    """Build a head that uses a state's tensors without a copy.

    Args:
        state: `prompt_encoder.*` and `mask_decoder.*` by key, as from `load_head` or a store's head file.
        image_size: side in pixels of the encoder's square, which prompts' coordinates refer to; a multiple of 16.

    Returns:
        The head in evaluation mode, its parameters frozen.

    Raises:
        CheckpointError: a key is missing, unknown, or of another shape.
    """
    with torch.device("meta"):
        head = SamHead(image_size)
    return load_into(head, state)


def load_into(head: SamHead, state: Mapping[str, Tensor]) -> SamHead:
    """Give a head on the meta device a state's tensors, without a copy.

    Args:
        head: head to complete, in place.
        state: `prompt_encoder.*` and `mask_decoder.*` by key.

    Returns:
        The head in evaluation mode, its parameters frozen.

    Raises:
        CheckpointError: a key is missing, unknown, or of another shape.
    """
    try:
        head.load_state_dict(dict(state), assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2]
        raise CheckpointError(f"not a SAM head: {''.join(first).strip()[:150]}") from None
    return head.requires_grad_(False).eval()


def assemble(image_encoder: nn.Module, head: SamHead) -> Sam:
    """Combine an image encoder and a head into segment_anything's `Sam`, without copying them.

    `SamPredictor` and `SamAutomaticMaskGenerator` accept it.

    Args:
        image_encoder: network from float32 normalised pixels (B, 3, S, S) to embeddings (B, 256, S/16, S/16), S being
            `head.image_size`; a student may take smaller pixels (`input_side`). Its attribute `img_size`, which those
            classes read, is set.
        head: SAM's head, on the encoder's device unless the whole model is moved afterwards.

    Returns:
        The model in evaluation mode, its parameters frozen. It takes prompts in pixels of the encoder's square (x to
        the right, y down) and returns mask logits, as documented in segment_anything/modeling/sam.py.
    """
    encoder: Any = image_encoder
    encoder.img_size = head.image_size
    sam = Sam(image_encoder, head.prompt_encoder, head.mask_decoder, list(PIXEL_MEAN), list(PIXEL_STD))
    return sam.requires_grad_(False).eval()
