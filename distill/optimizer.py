"""AdamW's parameter groups, with or without weight decay, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

HEAD_LR_SHARE = 0.1
"""Learning rate of a trained head, relative to the encoder's: it starts from the teacher's fully trained weights."""


def parameter_groups(module: nn.Module, weight_decay: float, lr_share: float = 1.0) -> list[dict[str, Any]]:
    """Return AdamW's two parameter groups: weight decay for matrices and kernels, none for vectors and biases.

    The second group holds the weights and biases of norms, the biases of layers and attention biases. Frozen
    parameters are in neither group.

    Args:
        module: module to train.
        weight_decay: weight decay of the first group; the second has 0.
        lr_share: factor of the schedule's learning rate for both groups, which the trainer applies.
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

    The last step of the warm-up has `base`; the step after the last one would have 0.

    Args:
        step: number of the optimizer step, from 0.
        steps: number of steps of the run.
        base: peak learning rate.
        warmup: share of the steps for the warm-up, 0 to below 1; their number is rounded up.
    """
    warm_steps = min(math.ceil(warmup * steps), steps)
    if step < warm_steps:
        return base * (step + 1) / warm_steps
    progress = (step - warm_steps) / (steps - warm_steps)
    return base * 0.5 * (1 + math.cos(math.pi * progress))
