"""Linear layers fused with the GELU or residual after them: one pass over memory instead of two or three, by oneDNN.

In bfloat16 on a CPU a product is so fast that reading and writing its result again, for a bias, a GELU or a
residual, takes a quarter of its time. The fused operation is computed before the result is rounded, so it is also
nearer to float32. Where oneDNN can't fuse, the same is computed in separate steps.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import cpu_accelerates_bfloat16


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Return `layer(x)`; the last axis has the layer's channels."""
    if _fuses(x, layer):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return layer(x)


def linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """Return `gelu(layer(x))`, with the exact GELU."""
    if _fuses(x, layer):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "none")
    return F.gelu(layer(x))


def linear_plus(x: Tensor, layer: nn.Linear, residual: Tensor) -> Tensor:
    """Return `layer(x) + residual`."""
    if _fuses(x, layer):
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, layer.weight, layer.bias, "add")
    # Adding in place saves a pass; nothing else holds a linear layer's result.
    out = layer(x)
    out += residual
    return out


def _fuses(x: Tensor, layer: nn.Linear) -> bool:
    """Return True if oneDNN's operators can be used: torch's own compiler uses them; they have no gradient."""
    gradient = torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad)
    return (
        x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.bfloat16
        and not gradient
        and not torch.compiler.is_compiling()  # torch's compiler fuses by itself
        and _available()
    )


@cache
def _available() -> bool:
    # The operators aren't part of torch's public interface, and refuse processors that only emulate bfloat16.
    return cpu_accelerates_bfloat16() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
