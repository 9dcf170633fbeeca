from __future__ import annotations

import pytest

from benchmarks.support.flatness import judge, line, neighbour_noise

X = list(range(1000, 21000, 1000))
WIGGLE = [(-1) ** n * (n % 3) for n in range(20)]


def test_the_noise_of_a_point_is_estimated_from_its_neighbours() -> None:
    assert 0.5 < neighbour_noise(WIGGLE) < 3


def test_a_curve_that_grows_by_more_than_its_noise_is_told_from_a_flat_one() -> None:
    assert judge(X, WIGGLE, floor=0).flat
    assert not judge(X, [w + n for n, w in enumerate(WIGGLE)], floor=0).flat
    assert judge(X, [5.0 - n for n in range(20)], floor=0).flat, "falling is no fault"


def test_a_curve_within_the_floor_is_flat_unless_it_rises_all_the_time() -> None:
    rising = [0.001 * n for n in X]
    assert judge(X, rising, floor=100).flat
    assert not judge(X, rising, floor=100, steepest=0.0005).flat
    assert judge(X, [min(n, 5) for n in range(20)], floor=10, steepest=0.0005).flat, "the rise has ended"


def test_a_straight_line_has_its_slope_and_no_error() -> None:
    slope, error = line(X, [3 * n + 7 for n in X])
    assert slope == pytest.approx(3, abs=1e-9)
    assert error < 1e-9
