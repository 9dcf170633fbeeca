"""SAM's head: the prompt encoder and the mask decoder, the same in every SAM and in MobileSAM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn

from ...common.errors import CheckpointError
from ..preprocess import PIXEL_MEAN, PIXEL_STD
from .head_shapes import WIDTH


class SamHead(nn.Module):
    """``prompt_encoder`` and ``mask_decoder`` under the names that SAM's checkpoints give them."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        grid = image_size // 16
        self.image_size = image_size
        self.prompt_encoder = PromptEncoder(
            embed_dim=WIDTH,
            image_embedding_size=(grid, grid),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        )
        self.mask_decoder = MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=2048, num_heads=8),
            transformer_dim=WIDTH,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        )


def build_head(state: Mapping[str, Tensor], image_size: int = 1024) -> SamHead:
    """The head in evaluation mode, its parameters frozen, holding ``state``'s own tensors.

    Args:
        state: ``prompt_encoder.*`` and ``mask_decoder.*``, as ``load_head`` and a store's head file have them.
        image_size: the side in pixels of the padded square that prompts' coordinates refer to.

    Raises:
        CheckpointError: a key is missing, unknown, or of another shape.
    """
    with torch.device("meta"):
        head = SamHead(image_size)
    try:
        head.load_state_dict(dict(state), assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2]
        raise CheckpointError(f"not a SAM head: {''.join(first).strip()[:150]}") from None
    return head.requires_grad_(False).eval()


# --- SAM put together: an image encoder and the head behind it, as `segment_anything`'s own class.


def assemble(image_encoder: nn.Module, head: SamHead) -> Sam:
    """A `Sam` of these very modules, which `SamPredictor` and `SamAutomaticMaskGenerator` take as they take any.

    Args:
        image_encoder: normalised pixels (B, 3, S, S) to embeddings (B, 256, S/16, S/16), S being `head.image_size`.
            Its attribute `img_size`, which those classes ask for, is set.
        head: SAM's prompt encoder and mask decoder, on the encoder's device or to be moved with the whole.

    Returns:
        The model in evaluation mode; its parameters take no gradient.
    """
    asked: Any = image_encoder
    asked.img_size = head.image_size
    sam = Sam(image_encoder, head.prompt_encoder, head.mask_decoder, list(PIXEL_MEAN), list(PIXEL_STD))
    return sam.requires_grad_(False).eval()
