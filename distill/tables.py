"""Learned tables of positions, brought to another size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SIDE = 256
"""Largest table that is resized, in rows: four times SAM's grid. A file may claim any."""


def resized_table(key: str, table: Tensor, wanted: tuple[int, ...]) -> Tensor | None:
    """`table` in the shape `wanted`, bicubically, float32; None where `key` is no table or it can't be done.

    TinyViT's `attention_biases` are (heads, side * side). A ViT's `pos_embed` is (1, tokens, width): class and
    distillation tokens come first, of which only as many are kept as are wanted. Both as timm resizes them.
    """
    if key.endswith("attention_biases") and table.ndim == len(wanted) == 2:
        if table.shape[0] != wanted[0] or not _side(table.shape[1]) or not _side(wanted[1]):
            return None
        return _resized(table[:, :, None], _side(wanted[1]))[:, :, 0]
    if key.endswith("pos_embed") and table.ndim == len(wanted) == 3:
        return _positions(table, wanted)
    return None


def _positions(table: Tensor, wanted: tuple[int, ...]) -> Tensor | None:
    tokens, wanted_tokens = _prefix(table.shape[1]), _prefix(wanted[1])
    if table.shape[::2] != wanted[::2] or tokens is None or wanted_tokens is None or wanted_tokens > tokens:
        return None
    grid = _resized(table[:, tokens:], _side(wanted[1] - wanted_tokens))
    return torch.cat([table[:, :wanted_tokens].float(), grid], dim=1)


def _resized(table_BNC: Tensor, side: int) -> Tensor:
    """(B, n * n, C) to (B, side * side, C)."""
    old = _side(table_BNC.shape[1])
    maps = table_BNC.float().transpose(1, 2).unflatten(2, (old, old))
    maps = F.interpolate(maps, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
    return maps.flatten(2).transpose(1, 2).contiguous()


def _side(cells: int) -> int:
    """The side of a square of so many cells; 0 where there is none or it is too large."""
    side = math.isqrt(max(cells, 0))
    return side if side * side == cells and side <= MAX_SIDE else 0


def _prefix(tokens: int) -> int | None:
    """How many tokens precede a square of positions: none, a class token, or a distillation token as well."""
    return next((prefix for prefix in range(3) if _side(tokens - prefix)), None)
