from __future__ import annotations

import hashlib
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilesam.sam import in_fraction

KEYS = [f"sa_000000/sa_{number}.jpg" for number in range(20_000)]


@given(
    key=st.binary(max_size=40), fraction=st.floats(0, 1, exclude_min=True), seed=st.integers(-(2**70), 2**70)
)
def test_an_image_is_kept_if_64_bits_of_its_sha_256_lie_below_the_fraction(
    key: bytes, fraction: float, seed: int
) -> None:
    digest = hashlib.sha256(str(seed).encode() + b"\0" + key).hexdigest()
    expected = Fraction(int(digest[:16], 16), 2**64) < Fraction(fraction)
    assert in_fraction(key.decode("utf-8", "surrogateescape"), fraction, seed) == expected


def test_the_choice_of_images_is_pinned_so_that_no_version_changes_it() -> None:
    assert [number for number in range(40) if in_fraction(KEYS[number], 0.1, 0)] == [18]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_about_a_fraction_of_the_images_is_kept(fraction: float) -> None:
    kept = sum(in_fraction(key, fraction, 0) for key in KEYS)
    spread = (len(KEYS) * fraction * (1 - fraction)) ** 0.5
    assert abs(kept - len(KEYS) * fraction) < 5 * spread


def test_a_larger_fraction_keeps_all_that_a_smaller_one_kept() -> None:
    small = {key for key in KEYS if in_fraction(key, 0.1, 7)}
    large = {key for key in KEYS if in_fraction(key, 0.2, 7)}
    assert small < large


def test_seeds_choose_independently() -> None:
    both = sum(in_fraction(key, 0.5, 0) and in_fraction(key, 0.5, 1) for key in KEYS)
    assert abs(both - len(KEYS) / 4) < 400


def test_a_fraction_of_1_keeps_every_image() -> None:
    assert all(in_fraction(key, 1.0, 3) for key in KEYS)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_a_fraction_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction must be above 0 and at most 1"):
        in_fraction("a.jpg", fraction, 0)
