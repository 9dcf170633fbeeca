from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mobilesam.distill import build_student
from mobilesam.distill.optimizer import (
    POLAR_EXPRESS,
    Muon,
    build_optimizer,
    learning_rate,
    orthogonalize,
    parameter_groups,
)
from mobilesam.distill.recipe import RECIPES, Recipe

COSINE = Recipe(summary="", lr=2.0, warmup=0.2)


def test_the_rate_follows_a_table_worked_out_by_hand() -> None:
    # 2 of 10 steps of warmup, then cos at eighths of a half turn.
    rates = [learning_rate(step, 10, replace(COSINE, lr=1.0), 5) for step in range(10)]
    cosines = [1.0, 0.9238795, 0.7071068, 0.3826834, 0.0, -0.3826834, -0.7071068, -0.9238795]
    assert rates == pytest.approx([0.5, 1.0] + [(1 + c) / 2 for c in cosines], abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25]),
        ("constant", [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("halving", [1.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5]),  # epochs of 4 steps
    ],
)
def test_the_other_schedules_follow_their_tables(schedule: str, rates: list[float]) -> None:
    recipe = replace(COSINE, schedule=schedule)
    assert [learning_rate(step, 10, recipe, 4) for step in range(10)] == pytest.approx(rates)


@given(st.integers(1, 500), st.floats(0, 0.99), st.sampled_from(["cosine", "linear"]))
def test_the_rate_rises_to_the_base_and_falls_without_reaching_zero(
    steps: int, warmup: float, schedule: str
) -> None:
    recipe = replace(COSINE, warmup=warmup, schedule=schedule)
    rates = [learning_rate(step, steps, recipe, 1) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates[top] == pytest.approx(2.0)
    assert rates[: top + 1] == sorted(set(rates[: top + 1]))
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0


def test_norms_biases_and_attention_biases_do_not_decay_and_all_else_does() -> None:
    student = build_student("tiny_vit", 64, seed=0)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decayed, free = parameter_groups(student, 0.3)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    ends = {names[id(p)].rsplit(".", 1)[-1] for p in decayed["params"]}
    assert ends == {"weight"}
    assert all(p.ndim >= 2 for p in decayed["params"])
    free_ends = {names[id(p)].rsplit(".", 1)[-1] for p in free["params"]}
    assert free_ends == {"weight", "bias", "attention_biases"}
    assert sorted(map(id, decayed["params"] + free["params"])) == sorted(names)
    assert parameter_groups(student, 0.3, decay_vectors=True)[1]["weight_decay"] == 0.3


def test_matrices_apart_are_the_weights_of_linear_layers_and_ungrouped_kernels() -> None:
    student = build_student("tiny_vit", 64, seed=0)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decayed, free, matrices = parameter_groups(student, 0.3, matrices_apart=True)
    assert all(p.ndim == 4 and p.shape[1] == 1 for p in decayed["params"]), (
        "depthwise kernels stay with AdamW"
    )
    assert {p.ndim for p in matrices["params"]} == {2, 4}
    groups = [decayed, free, matrices]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(names)
    assert [bool(group.get(Muon.MATRICES)) for group in groups] == [False, False, True]


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """The polynomials applied to the singular values alone, in float64."""
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum(-1, keepdim=True).sqrt()
    for a, b, c in POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
    return u @ torch.diag_embed(values) @ vh


@pytest.fixture
def _in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes as on a processor without bfloat16, whose rounding the polynomials amplify."""
    monkeypatch.setattr("mobilesam.distill.optimizer.accelerates_bfloat16", lambda _: False)


@pytest.mark.usefixtures("_in_float32")
def test_an_orthogonalised_matrix_keeps_its_singular_vectors_and_evens_their_values() -> None:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(3, rows, 24)).Q for rows in (24, 60))
    matrices = u @ torch.diag_embed(torch.logspace(-2, 0, 24).expand(3, 24)) @ v.mT
    for matrix in (matrices, matrices.mT):
        found = orthogonalize(matrix)
        torch.testing.assert_close(found.double(), polar(matrix), rtol=0, atol=1e-4)
        values = torch.linalg.svdvals(found)
        assert float(values.max() / values.min()) < 20, "from 100"


@pytest.mark.usefixtures("_in_float32")
def test_matrices_move_by_their_orthogonalised_momentum_and_vectors_as_by_adamw() -> None:
    torch.manual_seed(0)
    ours, bias = nn.Linear(40, 16), nn.Parameter(torch.zeros(16))
    ours.bias.data.zero_()
    recipe = replace(RECIPES["mobilesam-2026"], lr=0.02, weight_decay=0.1)
    optimizer = build_optimizer(recipe, ours, None, fused=False)
    adamw = torch.optim.AdamW([bias], lr=0.02, weight_decay=0.0)
    start = ours.weight.detach().double()
    weight, momentum = start.clone(), torch.zeros(16, 40, dtype=torch.float64)
    for _ in range(5):
        gradient_w, gradient_b = torch.randn(16, 40), torch.randn(16)
        ours.weight.grad, ours.bias.grad, bias.grad = gradient_w, gradient_b.clone(), gradient_b.clone()
        optimizer.step()
        adamw.step()
        momentum = 0.9 * momentum + 0.1 * gradient_w.double()
        direction = 0.1 * gradient_w.double() + 0.9 * momentum  # Nesterov
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * 0.2 * 40**0.5 * polar(direction)
    torch.testing.assert_close(ours.bias, bias)
    moved = float((weight - start).abs().max())
    torch.testing.assert_close(ours.weight.double(), weight, rtol=0, atol=1e-3 * moved)


def test_a_kernel_moves_as_the_matrix_of_its_rows() -> None:
    torch.manual_seed(0)
    kernel, matrix = nn.Conv2d(4, 8, 3, bias=False), nn.Linear(36, 8, bias=False)
    matrix.weight.data = kernel.weight.data.flatten(1).clone()
    gradient = torch.randn(8, 36)
    kernel.weight.grad, matrix.weight.grad = gradient.view(8, 4, 3, 3).clone(), gradient.clone()
    for layer in (kernel, matrix):
        build_optimizer(RECIPES["mobilesam-2026"], layer, None, fused=False).step()
    torch.testing.assert_close(kernel.weight.flatten(1), matrix.weight, rtol=0, atol=0)


def test_muons_state_is_saved_and_loaded() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    optimizer = build_optimizer(RECIPES["mobilesam-2026"], student, None, fused=False)

    def step(optimizer: torch.optim.Optimizer) -> None:
        torch.manual_seed(1)
        student(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(optimizer)
    saved, weights = deepcopy(optimizer.state_dict()), deepcopy(student.state_dict())
    step(optimizer)
    wanted = student[0].weight.detach().clone()
    student.load_state_dict(weights)
    other = build_optimizer(RECIPES["mobilesam-2026"], student, None, fused=False)
    other.load_state_dict({"state": saved["state"], "param_groups": other.state_dict()["param_groups"]})
    step(other)
    torch.testing.assert_close(student[0].weight, wanted, rtol=0, atol=0)
