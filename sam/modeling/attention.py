"""Attention with decomposed relative positions, as SAM's ViT has it, through torch's fused kernels.

A query at (y, x) adds q . Rh[y - y'] + q . Rw[x - x'] to its score for the key at (y', x'). For a whole image these
terms form a table as large as the scores, 0.8 GB for ViT-B, which is never held whole. There are three methods:
FlexAttention on CUDA, a bias made for a few heads at a time on a CPU in float32, and extra channels elsewhere.

Shape suffixes: B images or windows of them, K attention heads, N tokens (Y rows times X columns), D channels of one
head, Y and X rows and columns of the grid or window, L positions of a table of relative positions (2 Y - 1 or
2 X - 1).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BIAS_SCORES = 2**24
"""Most entries of the position table that are held at a time (64 MiB in float32), but at least those of one head."""

WIDTH_STEP = 8
"""Divisor of a head's width that CUDA takes in its fused kernels without padding (16 bytes in bfloat16)."""

logger = logging.getLogger(__name__)

_not_compilable: set[tuple[str, torch.dtype, int]] = set()
"""Device type, dtype and channels of a head for which compiling FlexAttention failed in this process."""


def attend(
    q_BKND: Tensor, k_BKND: Tensor, v_BKND: Tensor, table_h_LD: Tensor, table_w_LD: Tensor, rows: int
) -> Tensor:
    """Compute softmax(q k^T / sqrt(D) + relative positions) v.

    Args:
        q_BKND: queries (B, K, N, D), of any strides; the N tokens form `rows` rows.
        k_BKND: keys, of the same shape.
        v_BKND: values, of the same shape.
        table_h_LD: relative positions of rows (2 Y - 1, D); entry i is for a query that lies i - (Y - 1) rows after
            its key.
        table_w_LD: relative positions of columns (2 X - 1, D), likewise.
        rows: Y, rows of the grid of tokens.

    Returns:
        (B, K, N, D) in the queries' dtype, of any strides. Softmax is computed at least in float32.

    Source: segment_anything/modeling/image_encoder.py (`add_decomposed_rel_pos`); equation 4 of MViTv2, arXiv
    2112.01526.
    """
    rel_h_BKNY, rel_w_BKNX = _relative_scores(q_BKND, table_h_LD, table_w_LD, rows)
    places = rel_h_BKNY.shape[-1] + rel_w_BKNX.shape[-1]
    # FlexAttention has gradients, too, but sums those of the tables in an undefined order.
    if suits_flex(q_BKND.device.type, q_BKND.dtype, q_BKND.shape[-1], places) and not q_BKND.requires_grad:
        out_BKND = attend_compiled(q_BKND, k_BKND, v_BKND, rel_h_BKNY, rel_w_BKNX)
        if out_BKND is not None:
            return out_BKND
    if q_BKND.device.type == "cpu" and q_BKND.dtype in (torch.float32, torch.float64):
        return attend_with_bias(q_BKND, k_BKND, v_BKND, rel_h_BKNY, rel_w_BKNX)
    return attend_with_channels(q_BKND, k_BKND, v_BKND, rel_h_BKNY, rel_w_BKNX)


def suits_flex(device_type: str, dtype: torch.dtype, width: int, places: int) -> bool:
    """Return True if FlexAttention is the best method: on CUDA in bfloat16, for whole grids.

    The other method on CUDA (`attend_with_channels`) adds one channel for each row and column to a head's width. For
    a whole grid at 1024 pixels these are 128 channels beside ViT-B's 64 or ViT-H's 80. For a window they are only 28,
    while FlexAttention would need four blocks of 128 x 128, of which the 196 tokens fill 59%. float32 always uses
    the other method: precompute audits in float32, and an audit must not use the kernels that it audits.

    Args:
        device_type: `cpu` or `cuda`.
        dtype: dtype of the queries.
        width: channels of one head.
        places: rows plus columns of the grid or window.
    """
    return device_type == "cuda" and dtype == torch.bfloat16 and places > width


def attend_with_bias(
    q_BKND: Tensor, k_BKND: Tensor, v_BKND: Tensor, rel_h_BKNY: Tensor, rel_w_BKNX: Tensor
) -> Tensor:
    """Attend with the positions as a bias that is added to the scores, made for a few heads at a time.

    In float32 on a CPU `attend_with_channels` needs up to three times the multiplications, which dominate the time.

    Args:
        q_BKND: queries (B, K, N, D), of any strides; N is Y times X.
        k_BKND: keys, of the same shape.
        v_BKND: values, of the same shape.
        rel_h_BKNY: terms added to a query's scores for the keys of each row.
        rel_w_BKNX: terms added to a query's scores for the keys of each column.

    Returns:
        (B, K, N, D) in the queries' dtype.
    """
    batch, heads, tokens, _ = q_BKND.shape
    at_a_time = max(1, BIAS_SCORES // (batch * tokens**2))
    parts = []
    for first in range(0, heads, at_a_time):
        some = slice(first, first + at_a_time)
        bias_BKNYX = rel_h_BKNY[:, some, :, :, None] + rel_w_BKNX[:, some, :, None, :]
        parts.append(
            F.scaled_dot_product_attention(
                q_BKND[:, some], k_BKND[:, some], v_BKND[:, some], attn_mask=bias_BKNYX.flatten(3)
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def attend_with_channels(
    q_BKND: Tensor, k_BKND: Tensor, v_BKND: Tensor, rel_h_BKNY: Tensor, rel_w_BKNX: Tensor
) -> Tensor:
    """Attend with the positions as extra channels: a key's one-hot row and column select the query's terms.

    No table as large as the scores is made, so that the fastest kernels (which take no bias, or are slow with one)
    can be used. In bfloat16 on a CPU with AMX this was faster than a bias, for windows and for whole grids.

    Arguments and result are those of `attend_with_bias`.
    """
    width = q_BKND.shape[-1]
    rows, columns = rel_h_BKNY.shape[-1], rel_w_BKNX.shape[-1]
    # Windows of ViT-H have 80 + 28 channels: CUDA's kernels refuse that width, or copy everything to pad it.
    padding = -(width + rows + columns) % WIDTH_STEP
    # The call multiplies all scores by 1 / sqrt(D). The terms are multiplied by sqrt(D) to undo that; scaling the
    # queries instead would round them once more.
    root = width**0.5
    nothing = q_BKND.new_zeros(1).expand(*q_BKND.shape[:-1], padding)
    queries = torch.cat((q_BKND, rel_h_BKNY * root, rel_w_BKNX * root, nothing), dim=-1)
    places = F.pad(_one_hot_places(rows, columns, k_BKND), (0, padding))
    keys = torch.cat((k_BKND, places.expand(*k_BKND.shape[:2], -1, -1)), dim=-1)
    # The fused kernels require all three to have the same width.
    values = F.pad(v_BKND, (0, rows + columns + padding))
    return F.scaled_dot_product_attention(queries, keys, values, scale=1 / root)[..., :width]


def attend_with_flex(
    q_BKND: Tensor, k_BKND: Tensor, v_BKND: Tensor, rel_h_BKNY: Tensor, rel_w_BKNX: Tensor
) -> Tensor:
    """Attend by torch's FlexAttention, whose kernel looks up the positions' terms as it computes each score.

    When compiled, it holds neither the positions nor the scores as a table, and queries and keys keep their width.
    Uncompiled it holds all scores, which is acceptable only in tests.

    Arguments and result are those of `attend_with_bias`.
    """
    # Imported here, since that takes a second.
    from torch.nn.attention.flex_attention import flex_attention

    columns = rel_w_BKNX.shape[-1]

    def with_positions(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down = rel_h_BKNY[image, head, query, key // columns]
        across = rel_w_BKNX[image, head, query, key % columns]
        return score + down + across

    out = flex_attention(q_BKND, k_BKND, v_BKND, score_mod=with_positions)
    assert isinstance(out, Tensor)  # not a pair, since no log-sum-exp was requested
    return out


def attend_compiled(
    q_BKND: Tensor, k_BKND: Tensor, v_BKND: Tensor, rel_h_BKNY: Tensor, rel_w_BKNX: Tensor
) -> Tensor | None:
    """Attend by `attend_with_flex`, compiled at its first use.

    Arguments are those of `attend_with_bias`.

    Returns:
        (B, K, N, D) in the queries' dtype; None if compiling failed, now or before, which is logged once: there may
        be no C compiler or Triton, or torch's FlexAttention may not support heads of this width.
    """
    if torch.compiler.is_compiling():
        # The whole encoder is being compiled, including this call.
        return attend_with_flex(q_BKND, k_BKND, v_BKND, rel_h_BKNY, rel_w_BKNX)
    kind = (q_BKND.device.type, q_BKND.dtype, q_BKND.shape[-1])
    if kind in _not_compilable:
        return None
    try:
        return _compiled()(q_BKND, k_BKND, v_BKND, rel_h_BKNY, rel_w_BKNX)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - compilers raise anything, and there are other methods
        _not_compilable.add(kind)
        fact = next(iter(str(error).strip().splitlines()), "")
        logger.warning(
            "FlexAttention can't be compiled for %s heads of %d channels on %s (%s: %s); continuing without it",
            str(q_BKND.dtype).removeprefix("torch."),
            q_BKND.shape[-1],
            q_BKND.device.type,
            type(error).__name__,
            fact,
        )
        return None


@cache
def _compiled() -> Callable[..., Tensor]:
    # fullgraph: otherwise part of the graph, or a variant past torch's limit, would run uncompiled.
    return torch.compile(attend_with_flex, fullgraph=True, dynamic=False)


def _relative_scores(
    q_BKND: Tensor, table_h_LD: Tensor, table_w_LD: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Return the terms added to a query's scores for the keys of each row (B, K, N, Y) and column (B, K, N, X)."""
    columns = q_BKND.shape[2] // rows
    q_BKYXD = q_BKND.unflatten(2, (rows, columns))
    table_YYD = _by_distance(table_h_LD, rows).to(q_BKND.dtype)
    table_XXD = _by_distance(table_w_LD, columns).to(q_BKND.dtype)
    rel_h_BKYXY = torch.einsum("bkyxd,yzd->bkyxz", q_BKYXD, table_YYD)
    rel_w_BKYXX = torch.einsum("bkyxd,xzd->bkyxz", q_BKYXD, table_XXD)
    return rel_h_BKYXY.flatten(2, 3), rel_w_BKYXX.flatten(2, 3)


def _by_distance(table_LD: Tensor, side: int) -> Tensor:
    """Return the table's entry for each query coordinate and each key coordinate: (side, side, D)."""
    places = torch.arange(side, device=table_LD.device)
    return table_LD[places[:, None] - places[None, :] + side - 1]


def _one_hot_places(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return each token's row and column, one-hot: (N, Y + X)."""
    row_NY = torch.eye(rows, dtype=like.dtype, device=like.device).repeat_interleave(columns, dim=0)
    column_NX = torch.eye(columns, dtype=like.dtype, device=like.device).repeat(rows, 1)
    return torch.cat((row_NY, column_NX), dim=1)
