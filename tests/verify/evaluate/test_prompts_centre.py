from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mobilesam.verify.evaluate.prompts import centre_of_mask

masks = arrays.arrays(
    np.bool_, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=st.booleans()
).filter(lambda mask_HW: bool(mask_HW.any()))


def squared_distance(mask_HW: np.ndarray, y: int, x: int) -> int:
    """To the nearest pixel outside the mask, the image being surrounded by such pixels: all of them looked at."""
    outside = np.argwhere(~np.pad(mask_HW, 1)) - 1
    return int(((outside - (y, x)) ** 2).sum(axis=1).min())


def by_brute_force(mask_HW: np.ndarray) -> tuple[int, int]:
    distances = {(y, x): squared_distance(mask_HW, y, x) for y, x in np.argwhere(mask_HW).tolist()}
    greatest = max(distances.values())
    y, x = min(place for place, distance in distances.items() if distance == greatest)
    return x, y


@given(masks)
def test_the_centre_is_what_measuring_every_pixel_gives(mask_HW: np.ndarray) -> None:
    assert centre_of_mask(mask_HW) == by_brute_force(mask_HW)


def shape(name: str) -> np.ndarray:
    y, x = np.mgrid[0:60, 0:80]
    return {
        "disc": (y - 25) ** 2 + (x - 40) ** 2 < 300,
        "ring": abs((y - 30) ** 2 + (x - 40) ** 2 - 400) < 200,
        "diagonal": abs(y - x) < 5,
        "everything": y >= 0,
        "triangle": (y > x / 2) & (y < 50),
        "two": ((y - 10) ** 2 + (x - 10) ** 2 < 40) | ((y - 40) ** 2 + (x - 60) ** 2 < 90),
        "holes": ((y % 20 != 3) | (x % 23 != 5)) & (y > 2),
    }[name]


@pytest.mark.parametrize("name", ["disc", "ring", "diagonal", "everything", "triangle", "two", "holes"])
def test_the_centre_of_larger_shapes_is_exact_too(name: str) -> None:
    assert centre_of_mask(shape(name)) == by_brute_force(shape(name))


def test_the_centre_of_a_disc_is_its_centre_and_of_a_crescent_lies_on_it() -> None:
    y, x = np.mgrid[0:100, 0:120]
    disc = (y - 40) ** 2 + (x - 70) ** 2 <= 30**2
    assert centre_of_mask(disc) == (70, 40)
    crescent = disc & ~((y - 40) ** 2 + (x - 80) ** 2 <= 30**2)
    cx, cy = centre_of_mask(crescent)
    assert crescent[cy, cx]
    mean_y, mean_x = np.argwhere(crescent).mean(axis=0)
    assert (cx, cy) != (round(mean_x), round(mean_y))


def test_a_photos_largest_objects_take_seconds_at_most() -> None:
    y, x = np.mgrid[0:1500, 0:2250]
    start = time.process_time()
    for mask_HW in (y < x * 1500 / 2250, y >= 0, np.abs(y - x) < 40):
        centre_of_mask(mask_HW)
    assert time.process_time() - start < 12
