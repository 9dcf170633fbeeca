from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from mobilesam.predict.overlay import OPACITY
from mobilesam.verify.rendering.images import (
    POINT_COLOURS,
    PointMasks,
    choose_points,
    mask_panel,
    paint_masks,
)

SIZE = (80, 120)


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask_HW = np.zeros(SIZE, bool)
    mask_HW[top:bottom, left:right] = True
    return mask_HW


NOTHING, EVERYTHING = box(0, 0, 0, 0), box(0, 0, *SIZE)
LEFT, RIGHT, MIDDLE = box(0, 0, 80, 40), box(0, 80, 80, 120), box(20, 40, 60, 80)
MOST_OF_LEFT = box(0, 0, 80, 30)


def test_points_whose_masks_differ_are_chosen_in_order():
    masks_PHW = np.stack([NOTHING, LEFT, MOST_OF_LEFT, EVERYTHING, RIGHT, LEFT, MIDDLE])
    assert choose_points(masks_PHW) == [1, 4, 6]
    assert choose_points(masks_PHW, most=2) == [1, 4]


def test_masks_of_nothing_or_everything_are_better_than_none():
    assert choose_points(np.stack([EVERYTHING, EVERYTHING, NOTHING, NOTHING])) == [0, 2]
    assert choose_points(np.stack([NOTHING])) == [0]


def test_a_mask_tints_and_outlines_its_own_pixels_and_no_others():
    photo_HWC = np.full((*SIZE, 3), 100, np.uint8)
    picture_HWC = paint_masks(photo_HWC, np.stack([MIDDLE]), np.array([[0.1, 0.9]])).astype(int)
    colour = np.array(POINT_COLOURS[0])
    assert (picture_HWC[20:22, 40:80] == colour).all()
    inside = (1 - OPACITY) * 100 + OPACITY * colour
    assert np.abs(picture_HWC[22:58, 42:78] - inside).max() <= 0.5001
    assert (picture_HWC[:60, :40] == 100).all()
    assert tuple(picture_HWC[72, 12]) == POINT_COLOURS[0]  # the point


def test_a_small_mask_lies_on_top_of_a_large_one_whatever_their_order():
    photo_HWC = np.zeros((*SIZE, 3), np.uint8)
    for order in ([0, 1], [1, 0]):
        masks_pHW = np.stack([EVERYTHING, MIDDLE])[order]
        picture_HWC = paint_masks(photo_HWC, masks_pHW, np.zeros((2, 2)))
        large, small = (np.array(POINT_COLOURS[order.index(which)]) for which in (0, 1))
        wanted = (1 - OPACITY) * OPACITY * large + OPACITY * small
        assert np.abs(picture_HWC[40, 60] - wanted).max() <= 0.5001


def test_pictures_are_small_and_equal_masks_look_equal():
    photo_HWC = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)
    masks_pHW = np.zeros((2, 900, 1200), bool)
    masks_pHW[0, 100:400, 100:400] = masks_pHW[1, 500:700, 300:900] = True
    panel = mask_panel(
        photo_HWC,
        PointMasks(
            points_p2=np.array([[0.2, 0.25], [0.5, 0.7]]),
            teacher_pHW=masks_pHW,
            student_pHW=masks_pHW,
            ious_p=np.array([1.0, 1.0]),
            image_iou=0.75,
            compared=16,
        ),
    )
    assert panel.teacher == panel.student
    assert Image.open(io.BytesIO(base64.b64decode(panel.teacher.split(",")[1]))).size == (440, 330)
    assert panel.points == [(f"rgb{POINT_COLOURS[0]}", 1.0), (f"rgb{POINT_COLOURS[1]}", 1.0)]
