"""SAM put together: an image encoder and the head behind it, as `segment_anything`'s own class."""

from __future__ import annotations

from typing import Any

from segment_anything.modeling import Sam
from torch import nn

from .head import SamHead
from .images import PIXEL_MEAN, PIXEL_STD


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
