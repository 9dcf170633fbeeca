from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilesam.distill import build_student
from mobilesam.distill.optimizer import learning_rate, parameter_groups


def test_the_rate_follows_a_table_worked_out_by_hand() -> None:
    # 2 of 10 steps of warmup, then cos at eighths of a half turn.
    rates = [learning_rate(step, 10, 1.0, 0.2) for step in range(10)]
    cosines = [1.0, 0.9238795, 0.7071068, 0.3826834, 0.0, -0.3826834, -0.7071068, -0.9238795]
    assert rates == pytest.approx([0.5, 1.0] + [(1 + c) / 2 for c in cosines], abs=1e-6)


@given(st.integers(1, 500), st.floats(0, 0.99))
def test_the_rate_rises_to_the_base_and_falls_without_reaching_zero(steps: int, warmup: float) -> None:
    rates = [learning_rate(step, steps, 2.0, warmup) for step in range(steps)]
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
