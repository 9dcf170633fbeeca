from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilesam.sam.device import cpu_accelerates_bfloat16
from mobilesam.sam.modeling import vit
from mobilesam.sam.modeling.vit import linear, linear_gelu, linear_plus

BFLOAT16_STEP = 2**-8
accelerated = pytest.mark.skipif(
    not cpu_accelerates_bfloat16(), reason="this processor only emulates bfloat16, and nothing is fused"
)

FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "linear": (lambda x, layer, _: linear(x, layer), lambda x, layer, _: layer(x)),
    "gelu": (lambda x, layer, _: linear_gelu(x, layer), lambda x, layer, _: F.gelu(layer(x))),
    "plus": (linear_plus, lambda x, layer, residual: layer(x) + residual),
}


@pytest.fixture
def operands() -> tuple[Tensor, nn.Linear, Tensor]:
    """Of a product as in a ViT, in values that bfloat16 holds exactly."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 160)
    x, residual = torch.randn(2, 5, 7, 96), torch.randn(2, 5, 7, 160)
    with torch.no_grad():
        for tensor in (*layer.parameters(), x, residual):
            tensor.copy_(tensor.bfloat16())
    return x, layer, residual


def _as(dtype: torch.dtype, operands: tuple[Tensor, nn.Linear, Tensor]) -> tuple[Tensor, nn.Linear, Tensor]:
    x, layer, residual = operands
    return x.to(dtype), deepcopy(layer).to(dtype), residual.to(dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_layer_computes_what_the_separate_steps_do_in_float64(
    name: str, dtype: torch.dtype, operands: tuple[Tensor, nn.Linear, Tensor]
) -> None:
    ours, steps = FUNCTIONS[name]
    with torch.no_grad():
        found, expected = ours(*_as(dtype, operands)), steps(*_as(torch.float64, operands))
    assert found.dtype == dtype
    # Unfused bfloat16 rounds up to three times.
    tolerance = 1e-5 if dtype == torch.float32 else 3 * BFLOAT16_STEP
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@accelerated
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_fused_result_is_rounded_once(name: str, operands: tuple[Tensor, nn.Linear, Tensor]) -> None:
    ours, steps = FUNCTIONS[name]
    with torch.no_grad():
        found = ours(*_as(torch.bfloat16, operands)).double()
        expected = steps(*_as(torch.float64, operands))
    once = expected.bfloat16().double()
    # Sums in float32 may fall on the other side of a rounding.
    assert float((found != once).double().mean()) < 0.01


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_layer_that_needs_a_gradient_has_one(name: str, operands: tuple[Tensor, nn.Linear, Tensor]) -> None:
    ours, _ = FUNCTIONS[name]
    x, layer, residual = _as(torch.bfloat16, operands)
    ours(x, layer, residual).sum().backward()
    assert layer.weight.grad is not None
    assert bool(layer.weight.grad.isfinite().all())


def test_without_onednns_operators_nothing_is_fused(
    monkeypatch: pytest.MonkeyPatch, operands: tuple[Tensor, nn.Linear, Tensor]
) -> None:
    monkeypatch.setattr(vit, "_fusing_available", lambda: False)
    x, layer, residual = _as(torch.bfloat16, operands)
    with torch.no_grad():
        assert torch.equal(linear_plus(x, layer, residual), layer(x) + residual)
        assert torch.equal(linear_gelu(x, layer), F.gelu(layer(x)))
