from __future__ import annotations

import numpy as np
import torch

from mobilesam.distill.metrics.masks import grid_points, intersection_and_union, iou


def brute_force(one_HW: np.ndarray, other_HW: np.ndarray) -> float:
    shared = either = 0
    for y in range(one_HW.shape[0]):
        for x in range(one_HW.shape[1]):
            shared += int(one_HW[y, x] and other_HW[y, x])
            either += int(one_HW[y, x] or other_HW[y, x])
    return 1.0 if either == 0 else shared / either


def test_the_iou_is_what_counting_pixel_by_pixel_gives():
    rng = np.random.default_rng(0)
    one_PHW, other_PHW = (rng.random((7, 13, 17)) < rng.random((7, 1, 1)) for _ in range(2))
    one_PHW[0] = other_PHW[0] = False
    one_PHW[1] = False
    found_P = iou(*intersection_and_union(torch.from_numpy(one_PHW), torch.from_numpy(other_PHW)))
    assert found_P.tolist() == [brute_force(*pair) for pair in zip(one_PHW, other_PHW, strict=True)]
    assert found_P[:2].tolist() == [1.0, 0.0]


def test_points_are_the_centres_of_equal_parts_row_by_row():
    assert grid_points(2, (100, 300)).tolist() == [[75, 25], [225, 25], [75, 75], [225, 75]]
    assert grid_points(1, (31, 11)).tolist() == [[5.5, 15.5]]
    points_P2 = grid_points(4, (7, 1))
    assert (points_P2 > 0).all()
    assert (points_P2 < (1, 7)).all()
