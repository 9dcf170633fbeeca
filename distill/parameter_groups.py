"""Which of a student's weights decay."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups: matrices and kernels decay; vectors (norms, biases) and attention biases don't."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        (free if parameter.ndim <= 1 or "bias" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
