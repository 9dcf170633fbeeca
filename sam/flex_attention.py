"""Attention with decomposed relative positions through torch's FlexAttention.

The positions are terms that a compiled kernel looks up as it makes each score: neither they nor the scores are ever
held as a table, and queries and keys keep their own width. Letters of shapes as in `relative_attention`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_refused: set[tuple[str, torch.dtype, int]] = set()
"""Device type, dtype and head width of what this process could not compile."""


def suits_flex(device_type: str, dtype: torch.dtype, width: int, places: int) -> bool:
    """Whether to attend by FlexAttention: `places` rows and columns of a grid or window, heads of `width` channels.

    On CUDA in bfloat16, for whole grids. What the other way there (`attend_with_channels`) adds to a head's width is
    one channel for each row and column: for a whole grid at 1024 pixels 128, to ViT-B's 64 and ViT-H's 80; for a
    window only 28, while its 196 tokens would fill no more than 59% of four of FlexAttention's blocks of 128 x 128.
    float32 stays with the other way: precompute audits in it, and not by the kernels that it audits.
    """
    return device_type == "cuda" and dtype == torch.bfloat16 and places > width


def attend_with_flex(
    q_BKND: Tensor, k_BKND: Tensor, v_BKND: Tensor, rel_h_BKNY: Tensor, rel_w_BKNX: Tensor
) -> Tensor:
    """softmax(q k^T / sqrt(D) + relative positions) v: (B, K, N, D) in the queries' dtype.

    Args:
        q_BKND, k_BKND, v_BKND: (B, K, N, D) each, any strides.
        rel_h_BKNY, rel_w_BKNX: what a query adds to its score for the keys of each row, and of each column; N is
            Y times X.

    To be compiled: as it is, it holds all scores, which is good for tests alone.
    """
    # Here, since torch takes a second to import it.
    from torch.nn.attention.flex_attention import flex_attention

    columns = rel_w_BKNX.shape[-1]

    def with_positions(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down = rel_h_BKNY[image, head, query, key // columns]
        across = rel_w_BKNX[image, head, query, key % columns]
        return score + down + across

    out = flex_attention(q_BKND, k_BKND, v_BKND, score_mod=with_positions)
    assert isinstance(out, Tensor)  # not one of a pair: no log-sum-exp was asked for
    return out


def attend_compiled(
    q_BKND: Tensor, k_BKND: Tensor, v_BKND: Tensor, rel_h_BKNY: Tensor, rel_w_BKNX: Tensor
) -> Tensor | None:
    """`attend_with_flex`, compiled at its first use; None where that fails, for good and with one warning: there may
    be no C compiler or Triton, or a torch whose FlexAttention takes no heads of this width."""
    if torch.compiler.is_compiling():
        # The whole encoder is being compiled, and this with it.
        return attend_with_flex(q_BKND, k_BKND, v_BKND, rel_h_BKNY, rel_w_BKNX)
    kind = (q_BKND.device.type, q_BKND.dtype, q_BKND.shape[-1])
    if kind in _refused:
        return None
    try:
        return _compiled()(q_BKND, k_BKND, v_BKND, rel_h_BKNY, rel_w_BKNX)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - compilers raise anything, and there is another way to attend
        _refused.add(kind)
        fact = next(iter(str(error).strip().splitlines()), "")
        logger.warning(
            "FlexAttention can't be compiled for %s heads of %d channels on %s (%s: %s); going on without it",
            str(q_BKND.dtype).removeprefix("torch."),
            q_BKND.shape[-1],
            q_BKND.device.type,
            type(error).__name__,
            fact,
        )
        return None


@cache
def _compiled() -> Callable[..., Tensor]:
    # Whole or not at all: part of a graph, or one past torch's limit of variants, would run as it is.
    return torch.compile(attend_with_flex, fullgraph=True, dynamic=False)
