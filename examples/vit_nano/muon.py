"""Muon, the optimizer of vit_nano's hidden matrices in examples/vit_nano/train.py."""

from __future__ import annotations

import torch
from torch import Tensor

from mobilesam.sam.device import cpu_accelerates_bfloat16


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
        for matrix, update in zip(matrices, _orthogonal(torch.stack(directions)), strict=True):
            matrix.mul_(1 - lr * weight_decay)
            # Same step size as AdamW (arXiv 2502.16982, section 2.2).
            matrix.sub_(update, alpha=lr * 0.2 * max(matrix.shape) ** 0.5)


def _orthogonal(matrices_NRC: Tensor) -> Tensor:
    """Return approximately U V^T of each matrix U S V^T, by five Newton-Schulz steps."""
    if matrices_NRC.shape[1] > matrices_NRC.shape[2]:
        return _orthogonal(matrices_NRC.mT).mT
    x = matrices_NRC / (torch.linalg.matrix_norm(matrices_NRC, keepdim=True) + 1e-7)
    if cpu_accelerates_bfloat16():
        x = x.bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.float()
