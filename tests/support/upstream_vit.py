"""segment_anything's own image encoder at any size, the reference for ours."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import nn

from mobilesam.sam.registry import TEACHERS


def upstream_vit(name: str, image_size: int) -> ImageEncoderViT:
    """Build segment_anything's class with the sizes of one of our ViTs, in evaluation mode."""
    config = TEACHERS[name].encoder
    return upstream_encoder(image_size, config.width, config.depth, config.heads, config.global_blocks)


def upstream_encoder(
    image_size: int, width: int, depth: int, heads: int, global_blocks: Sequence[int]
) -> ImageEncoderViT:
    """Build segment_anything's class like its build_sam.py."""
    encoder = ImageEncoderViT(
        img_size=image_size,
        patch_size=16,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=4,
        out_chans=256,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=tuple(global_blocks),
    )
    return encoder.eval()


def randomise(encoder: nn.Module, seed: int) -> None:
    """Set random values with which every parameter affects the result.

    Upstream initialises positions with zeros and norms with ones.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or name.startswith(("neck.1", "neck.3")):
                parameter.copy_(name.endswith("weight") + 0.1 * noise)
            elif "rel_pos" in name or name == "pos_embed":
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.1 * noise)
