"""AdamW's parameter groups, with or without weight decay, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def parameter_groups(module: nn.Module, weight_decay: float, lr_share: float = 1.0) -> list[dict[str, Any]]:
    """Return AdamW's two parameter groups: matrices and kernels decay; vectors and attention biases don't.

    Vectors are the weights and biases of norms and the biases of layers. Parameters that take no gradients are in
    neither group.

    Args:
        module: what is trained.
        weight_decay: of the first group; the second has 0.
        lr_share: share of the schedule's rate that both groups learn with; the trainer multiplies by it.
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


def learning_rate(step: int, steps: int, base: float, warmup: float) -> float:
    """Return the learning rate of one step: a linear warm-up, then a half cosine.

    The rate rises linearly over the first steps, the last of which has `base`, and then falls towards 0, which the
    step after the last one would reach.

    Args:
        step: number of the optimizer step, from 0.
        steps: number of all steps of the run.
        base: highest rate.
        warmup: share of all steps, rounded up, over which the rate rises; 0 to below 1.
    """
    warm_steps = min(math.ceil(warmup * steps), steps)
    if step < warm_steps:
        return base * (step + 1) / warm_steps
    progress = (step - warm_steps) / (steps - warm_steps)
    return base * 0.5 * (1 + math.cos(math.pi * progress))
