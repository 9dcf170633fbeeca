from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilesam.distill.data.sampler import epoch_order, split_batches
from mobilesam.distill.optimizer import learning_rate


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


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=60), st.integers(0, 2**62), st.integers(0, 99))
def test_an_epoch_sees_every_row_once(rows: list[int], seed: int, epoch: int) -> None:
    assert sorted(epoch_order(rows, seed, epoch)) == sorted(rows)


def test_the_order_differs_by_epoch_and_by_seed_and_repeats_itself() -> None:
    rows = range(100)
    first = epoch_order(rows, 0, 0)
    assert first == epoch_order(rows, 0, 0)
    assert len({tuple(epoch_order(rows, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_the_order_is_the_same_on_every_machine() -> None:
    assert epoch_order(range(8), 7, 1) == [1, 3, 2, 7, 4, 5, 0, 6]


@given(st.integers(0, 40), st.integers(1, 9))
def test_no_row_is_dropped_when_cutting_batches(count: int, size: int) -> None:
    batches = split_batches(range(count), size)
    assert [row for batch in batches for row in batch] == list(range(count))
    assert all(len(batch) == size for batch in batches[:-1])
