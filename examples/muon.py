"""Muon, the optimizer of vit_nano's hidden matrices in examples/train_vit_nano.py."""

from __future__ import annotations

import torch
from torch import Tensor

from mobilesam.distill.optimizer import orthogonalize


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for matrices (Keller Jordan, https://kellerjordan.github.io/posts/muon).

    Computes like torch.optim.Muon, but in float32 on CPUs without bfloat16, where emulation takes 15 s a step.
    """

    def __init__(self, matrices: list[Tensor], weight_decay: float) -> None:
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                self._move(matrices, group["lr"], group["weight_decay"])

    def _move(self, matrices: list[Tensor], lr: float, weight_decay: float) -> None:
        """Update matrices of one shape."""
        directions = []
        for matrix in matrices:
            momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
            momentum.lerp_(matrix.grad, 0.05)
            directions.append(matrix.grad.lerp(momentum, 0.95))
        for matrix, update in zip(matrices, orthogonalize(torch.stack(directions)), strict=True):
            matrix.mul_(1 - lr * weight_decay)
            # Same step size as AdamW (arXiv 2502.16982, section 2.2).
            matrix.sub_(update, alpha=lr * 0.2 * max(matrix.shape) ** 0.5)
