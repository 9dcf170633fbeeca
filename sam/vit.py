"""Which ViT image encoders SAM has, and their positions at any image size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor

from .images import PATCH
from .vit_encoder import ViTEncoder


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of one SAM ViT; ``global_blocks`` attend over the whole grid, the others in 14 x 14 windows.

    Source: segment_anything/build_sam.py (vit_nano is ours).
    """

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]


VITS: Mapping[str, ViTConfig] = MappingProxyType(
    {
        "vit_h": ViTConfig(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
        "vit_l": ViTConfig(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
        "vit_b": ViTConfig(width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11)),
        "vit_nano": ViTConfig(width=128, depth=4, heads=4, global_blocks=(1, 3)),
    }
)


def build_vit(name: str, image_size: int) -> ViTEncoder:
    """SAM's image encoder ``name``: (B, 3, S, S) normalised pixels to (B, 256, S/16, S/16).

    Built under ``torch.device("meta")`` it costs neither memory nor initialisation.
    """
    config = VITS[name]
    return ViTEncoder(image_size, config.width, config.depth, config.heads, config.global_blocks)


def fit_positions(
    state: dict[str, Tensor], config: ViTConfig, image_size: int
) -> tuple[dict[str, Tensor], bool]:
    """An encoder's state with its positions resampled to the grid of ``image_size``.

    The absolute table (1, g, g, width) is resampled bicubically; the relative tables of the global blocks,
    (2g - 1, head width), linearly, as segment_anything does by itself at run time. Windowed blocks keep
    theirs: a window is 14 cells at any size.

    Returns:
        The state, and whether anything was resampled (nothing is when the grid is the trained one).
    """
    grid = image_size // PATCH
    fitted = dict(state)
    if state["pos_embed"].shape[1:3] != (grid, grid):
        fitted["pos_embed"] = _resample_table(state["pos_embed"], grid)
    length = 2 * grid - 1
    for block in config.global_blocks:
        for axis in ("h", "w"):
            key = f"blocks.{block}.attn.rel_pos_{axis}"
            if state[key].shape[0] != length:
                fitted[key] = _resample_relative(state[key], length)
    return fitted, any(fitted[key] is not state[key] for key in state)


def _resample_table(table_1HWC: Tensor, grid: int) -> Tensor:
    table_1CHW = table_1HWC.float().permute(0, 3, 1, 2)
    resampled = F.interpolate(table_1CHW, size=(grid, grid), mode="bicubic", antialias=True)
    return resampled.permute(0, 2, 3, 1).contiguous()


def _resample_relative(table_LD: Tensor, length: int) -> Tensor:
    table_1DL = table_LD.float().T[None]
    return F.interpolate(table_1DL, size=length, mode="linear")[0].T.contiguous()
