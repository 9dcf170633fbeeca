"""Which weights are trained, and how: what decays, and at what rate."""

from __future__ import annotations

import math
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


# --- The learning rate as a function of the step.


def learning_rate(step: int, steps: int, base: float, warmup: float) -> float:
    """The rate of optimizer step `step` (from 0) out of `steps`.

    The first `warmup` share of all steps (rounded up) rises linearly and ends at `base`; what is left falls
    along a half cosine towards 0, which the step after the last one would reach.
    """
    warm_steps = min(math.ceil(warmup * steps), steps)
    if step < warm_steps:
        return base * (step + 1) / warm_steps
    progress = (step - warm_steps) / (steps - warm_steps)
    return base * 0.5 * (1 + math.cos(math.pi * progress))
