from __future__ import annotations

import numpy as np
import pytest

from mobilesam.verify.rendering.charts import bin_range, histogram, thin

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e-3, 1.0])
def test_no_value_falls_out_of_a_histogram(scale):
    values = list(0.3 + scale * RNG.normal(size=12))
    low, high = bin_range(values)
    counts, _ = np.histogram(values, bins=6, range=(low, high))
    assert counts.sum() == 12
    assert high - low >= 0.99e-4


@pytest.mark.parametrize("spread", [0.0, 1e-16, 1e-9])
def test_equal_cosines_have_a_histogram(spread):
    pytest.importorskip("matplotlib")
    values = [1.0, 1.0 + spread, 1.0 - spread]
    assert "<path" in histogram("cosines", values, {"mean": 1.0}, xlabel="cosine")


def test_a_long_history_is_thinned_to_means():
    x, y = thin(list(range(1000)), [float(v) for v in range(1000)], most=300)
    assert len(x) == 250
    assert x[:2] == [1.5, 5.5]
    assert x == y
    assert thin([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])
