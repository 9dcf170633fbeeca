from __future__ import annotations

import statistics
from typing import Any

import pytest

from mobilesam.verify.sweep.aggregate import Spread, grouped, varying


def outcome(miou: float, seed: int = 0, **options: Any) -> dict[str, Any]:
    shared = {"student": "tiny_vit", "objective": "decoupled", "batch_size": 8, "epochs": 4}
    return {"options": {**shared, **options, "seed": seed}, "status": "done", "val": {"miou": miou}}


@pytest.mark.parametrize("values", [[0.5], [0.1, 0.4], [0.3, 0.3, 0.9, 1.0]])
def test_a_spread_is_what_the_standard_library_says(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread is not None
    assert spread.mean == pytest.approx(statistics.mean(values))
    assert (spread.lowest, spread.highest, spread.count) == (min(values), max(values), len(values))
    if len(values) == 1:
        assert spread.deviation is None
    else:
        assert spread.deviation == pytest.approx(statistics.stdev(values))


def test_undefined_numbers_have_no_part_in_a_spread() -> None:
    assert Spread.of([None, 0.25, float("nan")]) == Spread.of([0.25])
    assert Spread.of([None]) is None


def test_runs_that_differ_by_seed_alone_are_a_group() -> None:
    groups = grouped([outcome(0.5, 0), outcome(0.6, 0, lr=1.0), outcome(0.7, 1), {"status": "failed"}])
    assert [[each["options"]["seed"] for each in group.outcomes] for group in groups] == [[0, 1], [0]]


def test_an_option_that_means_nothing_for_some_runs_does_not_tell_them_apart() -> None:
    groups = grouped([outcome(0.5), outcome(0.5, objective="coupled", objects=4)])
    assert varying(groups) == ["objective"]
