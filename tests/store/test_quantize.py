"""int8 quantisation: error bounds, scales, zeros.

Shape suffixes: B images, C channels, H and W rows and columns of an embedding, 1 one.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mobilesam.store.quantize import dequantize, quantize


@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(1e-6, 1e6))
def test_int8_is_within_half_a_step_of_every_value(seed: int, spread: float) -> None:
    emb_CHW = (np.random.default_rng(seed).normal(size=(7, 5, 3)) * spread).astype(np.float32)
    values_CHW, scales_C = quantize(emb_CHW)
    back_CHW = dequantize(values_CHW[None], scales_C[None])[0]
    half_step_C11 = scales_C[:, None, None] / 2
    assert values_CHW.dtype == np.int8
    assert (np.abs(back_CHW - emb_CHW) <= half_step_C11 * (1 + 1e-5)).all()


def test_the_largest_magnitude_of_each_channel_maps_to_127() -> None:
    emb_CHW = np.array([[[1.0, -4.0]], [[0.5, 0.25]]], np.float32)
    values_CHW, scales_C = quantize(emb_CHW)
    assert values_CHW.tolist() == [[[32, -127]], [[127, 64]]]
    np.testing.assert_allclose(scales_C, [4 / 127, 0.5 / 127], rtol=1e-6)


def test_a_channel_of_zeros_stays_zero() -> None:
    values_CHW, scales_C = quantize(np.zeros((2, 3, 3), np.float32))
    assert not values_CHW.any()
    assert not scales_C.any()
    assert not dequantize(values_CHW[None], scales_C[None]).any()


def test_relative_mse_on_normal_values_is_within_the_published_figure() -> None:
    emb_CHW = np.random.default_rng(1).normal(size=(256, 64, 64)).astype(np.float32)
    values_CHW, scales_C = quantize(emb_CHW)
    error = dequantize(values_CHW[None], scales_C[None])[0].astype(np.float64) - emb_CHW
    assert (error**2).sum() / (emb_CHW.astype(np.float64) ** 2).sum() < 1e-4
