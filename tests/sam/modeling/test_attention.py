"""Attention with a bias and with further channels, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mobilesam.sam.modeling import attention
from mobilesam.sam.modeling.attention import attend


def brute_force(q: Tensor, k: Tensor, v: Tensor, table_h: Tensor, table_w: Tensor, rows: int) -> Tensor:
    """Score by score, as the definition says it."""
    tokens, width = q.shape
    columns = tokens // rows
    out = torch.empty_like(q)
    for i in range(tokens):
        scores = torch.empty(tokens, dtype=q.dtype)
        for j in range(tokens):
            down = i // columns - j // columns + rows - 1
            right = i % columns - j % columns + columns - 1
            scores[j] = q[i] @ k[j] / width**0.5 + q[i] @ table_h[down] + q[i] @ table_w[right]
        out[i] = scores.softmax(0) @ v
    return out


@pytest.mark.parametrize("way", ["attend_with_bias", "attend_with_channels"])
@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (4, 4), (1, 6)])
def test_attention_agrees_with_its_definition_score_by_score(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, way: str
) -> None:
    monkeypatch.setattr(attention, "attend_with_bias", getattr(attention, way))
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, rows * columns, 6, generator=generator, dtype=torch.float64)
    table_h = torch.randn(2 * rows - 1, 6, generator=generator, dtype=torch.float64)
    table_w = torch.randn(2 * columns - 1, 6, generator=generator, dtype=torch.float64)
    found = attend(q, k, v, table_h, table_w, rows)
    for image in range(2):
        for head in range(3):
            expected = brute_force(q[image, head], k[image, head], v[image, head], table_h, table_w, rows)
            torch.testing.assert_close(found[image, head], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("width", "rows", "columns"), [(80, 14, 14), (64, 14, 14), (80, 5, 9)])
def test_the_fused_kernels_get_heads_of_a_multiple_of_8_channels(
    monkeypatch: pytest.MonkeyPatch, width: int, rows: int, columns: int
) -> None:
    monkeypatch.setattr(attention, "attend_with_bias", attention.attend_with_channels)
    seen: list[int] = []
    fused = attention.F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: float) -> Tensor:
        seen.extend(one.shape[-1] for one in (q, k, v))
        return fused(q, k, v, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    q = torch.zeros(1, 2, rows * columns, width)
    attend(q, q, q, torch.zeros(2 * rows - 1, width), torch.zeros(2 * columns - 1, width), rows)
    assert seen == [width + rows + columns + -(width + rows + columns) % 8] * 3
