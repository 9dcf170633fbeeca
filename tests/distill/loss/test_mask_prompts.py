from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilesam.distill.loss.mask_prompts import (
    borders_to_square,
    correction_pixel,
    noisy_box,
    pixels_to_square,
    uniform_pixel,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_pixel_of_a_region_is_drawn_as_often():
    region = torch.zeros(1, 6, 7, dtype=torch.bool)
    places = [(0, 0), (2, 3), (5, 6), (5, 0)]
    for y, x in places:
        region[0, y, x] = True
    draws = 20_000
    drawn = uniform_pixel(region.expand(draws, -1, -1), generator())
    counts = {(int(y), int(x)): 0 for y, x in places}
    for x, y in drawn.tolist():
        counts[y, x] += 1  # a pixel outside the region would be a KeyError
    # Four standard deviations of a binomial count.
    assert all(abs(n - draws / 4) < 4 * (draws * 3 / 16) ** 0.5 for n in counts.values())


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_a_pixel_lies_in_its_own_region(seed: int, height: int, width: int):
    rng = np.random.default_rng(seed)
    regions = torch.from_numpy(rng.random((5, height, width)) < 0.3)
    for region, (x, y) in zip(regions, uniform_pixel(regions, generator(seed)).tolist(), strict=True):
        assert bool(region[y, x]) or not bool(region.any())


def test_a_correction_lies_where_the_answer_is_wrong_with_the_label_of_that_pixel():
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[:, 1, 1:3] = True
    answers = masks.clone()
    answers[0, 1, 2] = False  # missed
    answers[1, 3, 3] = True  # too much
    inside = torch.ones_like(masks)
    pixels, labels = correction_pixel(masks, answers, inside, generator())
    assert pixels[:2].tolist() == [[2, 1], [3, 3]]
    assert labels.tolist() == [1, 0, 1]
    # The third answer is right: the point only says so again.
    assert bool(masks[2, pixels[2, 1], pixels[2, 0]])
    # An error in the padding is none.
    inside[1, 3] = False
    pixels, labels = correction_pixel(masks, answers, inside, generator())
    assert labels[1] == 1
    assert bool(masks[1, pixels[1, 1], pixels[1, 0]])


def test_a_box_without_noise_is_the_masks_own():
    masks = torch.zeros(2, 8, 10, dtype=torch.bool)
    masks[0, 2:5, 3:9] = True
    masks[1, 7, 0] = True
    assert noisy_box(masks, generator(), 0.0).tolist() == [[3, 2, 9, 5], [0, 7, 1, 8]]


def test_a_boxs_sides_move_by_a_tenth_of_its_length_within_the_limit_and_the_square():
    masks = torch.zeros(4000, 40, 40, dtype=torch.bool)
    masks[:, 10:30, 15:25] = True
    boxes = noisy_box(masks, generator(), 100.0)
    moved = boxes - torch.tensor([15.0, 10.0, 25.0, 30.0])
    torch.testing.assert_close(moved.std(dim=0), torch.tensor([1.0, 2.0, 1.0, 2.0]), rtol=0.1, atol=0)
    assert moved.mean(dim=0).abs().max() < 0.15
    limited = noisy_box(masks, generator(), 0.5) - torch.tensor([15.0, 10.0, 25.0, 30.0])
    assert limited.abs().max() == 0.5
    whole = noisy_box(torch.ones(500, 40, 40, dtype=torch.bool), generator(), 100.0)
    assert whole.min() >= 0
    assert whole.max() <= 40


def test_a_seed_draws_the_same_pixels():
    regions = torch.rand(50, 9, 9) < 0.5
    assert torch.equal(uniform_pixel(regions, generator(3)), uniform_pixel(regions, generator(3)))
    assert not torch.equal(uniform_pixel(regions, generator(3)), uniform_pixel(regions, generator(4)))


def test_pixels_of_a_mask_are_the_centres_of_their_part_of_the_square():
    # SAM adds half a pixel to every coordinate: a pixel's centre is its whole number.
    assert pixels_to_square(torch.tensor([[0, 1]]), 64, 16).tolist() == [[1.5, 5.5]]
    assert pixels_to_square(torch.tensor([[0, 1]]), 64, 64).tolist() == [[0, 1]]
    assert borders_to_square(torch.tensor([[0.0, 0.0, 16.0, 16.0]]), 64, 16).tolist() == [
        [-0.5, -0.5, 63.5, 63.5]
    ]
