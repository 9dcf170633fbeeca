"""Which weights are trained, and how: what decays, and at what rate."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(module: nn.Module, weight_decay: float, lr_share: float = 1.0) -> list[dict[str, Any]]:
    """AdamW's two groups: matrices and kernels decay; vectors (norms, biases) and attention biases don't.

    Parameters that take no gradients are in neither. `lr_share` is kept in both, for whoever sets their rates.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim <= 1 or "bias" in name else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "lr_share": lr_share},
        {"params": free, "weight_decay": 0.0, "lr_share": lr_share},
    ]
