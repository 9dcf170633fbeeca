"""SAM's head: the prompt encoder and the mask decoder, the same in every SAM and in MobileSAM."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from .errors import CheckpointError
from .head_shapes import HEAD_PREFIXES as HEAD_PREFIXES
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
