"""Optimizer, parameter groups and learning-rate schedule.

Shape suffixes: N matrices of one shape, H, W their rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..sam.device import accelerates_bfloat16
from .recipe import Recipe

MUON_MOMENTUM = 0.9
"""Better than the usual 0.95 in short trainings (docs/RECIPE.md)."""
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
)
"""Coefficients of the quintics that bring singular values near 1, the first three of Amsel et al. (arXiv 2505.16932).
In the miniature three of them are better than Jordan's five equal ones, at 60% of the cost."""


class Muon(torch.optim.AdamW):
    """Orthogonalised momentum for matrices and kernels, AdamW for all other parameters.

    The update of a matrix is near the semi-orthogonal matrix next to its momentum: the singular directions of the
    gradient move about equally far. Source: Keller Jordan, https://kellerjordan.github.io/posts/muon. It is scaled
    to the usual size of AdamW's, so that one learning rate serves both (arXiv 2502.16982, section 2.2). Kernels are
    orthogonalised as (out, in * height * width) matrices. `torch.optim.Muon` takes neither kernels nor AdamW's
    parameters, and computes one matrix at a time.

    Args:
        groups: parameter groups of `parameter_groups`; those marked `MATRICES` are orthogonalised.
        lr: learning rate.
        fused: AdamW's fused kernel, for GPUs.
    """

    MATRICES = "matrices"
    """Key of a parameter group, True if Muon updates it, False or missing if AdamW does."""

    def __init__(self, groups: Sequence[dict[str, Any]], *, lr: float, fused: bool) -> None:
        super().__init__(groups, lr=lr, fused=fused)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have gradients; the gradients of matrices are dropped."""
        for group in self.param_groups:
            if group.get(self.MATRICES):
                by_shape: dict[tuple[int, int], list[Tensor]] = {}
                for matrix in group["params"]:
                    if matrix.grad is not None:
                        shape = len(matrix), matrix[0].numel()
                        by_shape.setdefault(shape, []).append(matrix)
                for matrices in by_shape.values():
                    self._update(matrices, group["lr"], group["weight_decay"])
        super().step()  # skips parameters without a gradient

    def _update(self, matrices: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        """Update matrices or kernels whose flattened shapes are the same."""
        momenta = [self._momentum(matrix) for matrix in matrices]
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - MUON_MOMENTUM)
        directions = torch._foreach_lerp(gradients, momenta, MUON_MOMENTUM)
        updates_NHW = orthogonalize(torch.stack([direction.flatten(1) for direction in directions]))
        scale = 0.2 * max(updates_NHW.shape[1:]) ** 0.5
        torch._foreach_mul_(list(matrices), 1 - lr * weight_decay)
        for matrix, update_HW in zip(matrices, updates_NHW, strict=True):
            matrix.sub_(update_HW.view_as(matrix), alpha=lr * scale)
            matrix.grad = None

    def _momentum(self, matrix: Tensor) -> Tensor:
        """Return the moving average of a matrix's gradients, to be updated, after counting a step."""
        state = self.state[matrix]
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(matrix)}
        state["step"] += 1
        average: Tensor = state["exp_avg"]
        return average


def orthogonalize(matrices_NHW: Tensor) -> Tensor:
    """Return approximately U V^T of each matrix U S V^T, by three Newton-Schulz steps.

    Args:
        matrices_NHW: float32 (N, H, W). They are computed in bfloat16 where the hardware accelerates it.

    Returns:
        (N, H, W), bfloat16 if computed so, else float32, with singular values of about 0.2 to 1.9 (smaller ones where
        the matrix's differ by more than a factor of 100; 0 for a matrix of zeros).
    """
    if matrices_NHW.shape[1] > matrices_NHW.shape[2]:
        return orthogonalize(matrices_NHW.mT).mT
    fast = accelerates_bfloat16(matrices_NHW.device)
    x_NHW = matrices_NHW.to(torch.bfloat16 if fast else torch.float32)
    gram_NHH = x_NHW @ x_NHW.mT
    # The Frobenius norm, by which X is divided so that its singular values are at most 1: the Gram matrix has it.
    norm_N11 = gram_NHH.diagonal(dim1=1, dim2=2).float().sum(dim=1).sqrt()[:, None, None] + 1e-7
    gram_NHH = (gram_NHH / norm_N11.square()).to(x_NHW.dtype)
    # A step multiplies X by Z = a I + b G + c G G, with G = X X^T. Z and G commute, so the wide X is needed at the
    # beginning and at the end only.
    first, *others = POLAR_EXPRESS
    product_NHH = factor_NHH = _step_factor(gram_NHH, first)
    for coefficients in others:
        gram_NHH = factor_NHH @ gram_NHH @ factor_NHH
        factor_NHH = _step_factor(gram_NHH, coefficients)
        product_NHH = factor_NHH @ product_NHH
    return (product_NHH / norm_N11).to(x_NHW.dtype) @ x_NHW


def _step_factor(gram_NHH: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """Return a I + b G + c G G of each Gram matrix G."""
    a, b, c = coefficients
    factor_NHH = torch.baddbmm(gram_NHH, gram_NHH, gram_NHH, beta=b, alpha=c)
    factor_NHH.diagonal(dim1=1, dim2=2).add_(a)
    return factor_NHH


def build_optimizer(
    recipe: Recipe,
    encoder: nn.Module,
    head: nn.Module | None,
    *,
    fused: bool,
) -> torch.optim.Optimizer:
    """Return the recipe's optimizer of the weights that are trained.

    Args:
        recipe: settings of the training.
        encoder: student; its frozen weights are left out.
        head: SAM's head if it is trained, by AdamW and with a learning rate of its own.
        fused: use AdamW's fused kernel, for GPUs.
    """
    muon = recipe.optimizer == "muon"
    groups = parameter_groups(
        encoder,
        recipe.weight_decay,
        recipe.adamw_lr_share if muon else 1.0,
        decay_vectors=recipe.decay_vectors,
        matrices_apart=muon,
    )
    if head is not None:
        groups += parameter_groups(
            head, recipe.weight_decay, recipe.head_lr_share, decay_vectors=recipe.decay_vectors
        )
    return (Muon if muon else torch.optim.AdamW)(groups, lr=recipe.lr, fused=fused)


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    lr_share: float = 1.0,
    *,
    decay_vectors: bool = False,
    matrices_apart: bool = False,
) -> list[dict[str, Any]]:
    """Return the parameter groups of a module: by default weight decay for matrices and kernels, none for the rest.

    The rest are the weights and biases of norms, the biases of layers and attention biases. Frozen parameters are in
    no group.

    Args:
        module: module to train.
        weight_decay: weight decay.
        lr_share: factor of the schedule's learning rate, which the trainer applies; 1 for matrices apart.
        decay_vectors: decay the rest, too.
        matrices_apart: add a group for `Muon`, of the weights of linear layers and of convolutions with one group; a
            grouped convolution's kernel holds many small matrices.
    """
    apart = _matrices(module) if matrices_apart else set()
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter in apart:
            matrices.append(parameter)
        elif parameter.requires_grad:
            (rest if parameter.ndim <= 1 or "bias" in name else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": weight_decay if decay_vectors else 0.0},
    ]
    if matrices:
        groups.append(
            {"params": matrices, "weight_decay": weight_decay, "lr_share": 1.0, Muon.MATRICES: True}
        )
    return [{"lr_share": lr_share, **group} for group in groups]


def _matrices(module: nn.Module) -> set[Tensor]:
    """Return the weights of linear layers and of convolutions with one group."""
    return {
        layer.weight
        for layer in module.modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


def learning_rate(step: int, steps: int, recipe: Recipe, steps_per_epoch: int) -> float:
    """Return the learning rate of one step: a linear warm-up, then the recipe's schedule.

    The last step of the warm-up has `recipe.lr`. If a schedule ends at 0, the step after the last one would have 0.

    Args:
        step: number of the optimizer step, from 0.
        steps: number of steps of the run.
        recipe: settings of the training; the number of its warm-up's steps is rounded up.
        steps_per_epoch: number of steps of an epoch, for the schedule "halving".
    """
    warm_steps = min(math.ceil(recipe.warmup * steps), steps)
    if step < warm_steps:
        return recipe.lr * (step + 1) / warm_steps
    progress = (step - warm_steps) / (steps - warm_steps)
    match recipe.schedule:
        case "cosine":
            return recipe.lr * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return recipe.lr * (1 - progress)
        case "halving":
            return recipe.lr * 0.5 ** (step // steps_per_epoch)
    assert recipe.schedule == "constant", recipe.schedule
    return recipe.lr
