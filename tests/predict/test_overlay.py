from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from mobilesam.predict import PredictError
from mobilesam.predict.mask_files import Mask
from mobilesam.predict.overlay import (
    OPACITY,
    check_format,
    contour,
    draw_overlay,
    encode_picture,
    mask_colour,
)
from mobilesam.predict.prompts import ImagePrompts

NOWHERE = ImagePrompts(everything=True)


def mask(pixels_HW: np.ndarray) -> Mask:
    height, width = pixels_HW.shape
    return Mask.from_pixels(
        pixels_HW, predicted_iou=0.9, stability_score=1.0, point_coords=[], crop_box=[0, 0, width, height]
    )


def block(size: tuple[int, int], rows: slice, columns: slice) -> np.ndarray:
    pixels_HW = np.zeros(size, bool)
    pixels_HW[rows, columns] = True
    return pixels_HW


@pytest.fixture
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def brute_contour(inside_HW: np.ndarray, line: int) -> np.ndarray:
    """Pixels of the mask with something outside it at most `line` steps away, counting every path's length."""
    height, width = inside_HW.shape
    found = np.zeros_like(inside_HW)
    for y, x in itertools.product(range(height), range(width)):
        for dy, dx in itertools.product(range(-line, line + 1), repeat=2):
            if abs(dy) + abs(dx) > line or not inside_HW[y, x]:
                continue
            there = 0 <= y + dy < height and 0 <= x + dx < width
            found[y, x] |= not (there and inside_HW[y + dy, x + dx])
    return found


@pytest.mark.parametrize("line", [1, 2])
def test_a_contour_is_what_lies_next_to_the_outside(line: int) -> None:
    rng = np.random.default_rng(1)
    for share in (0.3, 0.9, 0.98):
        pixels_HW = rng.random((13, 17)) < share
        np.testing.assert_array_equal(contour(pixels_HW, line), brute_contour(pixels_HW, line))


def test_a_mask_is_its_colour_over_the_photo_with_a_contour_and_all_else_is_the_photo(
    photo: np.ndarray,
) -> None:
    pixels_HW = np.random.default_rng(2).random((40, 60)) < 0.9
    pixels_HW[:, 50:] = False
    drawn = draw_overlay(photo, [mask(pixels_HW)], NOWHERE)
    colour = np.array(mask_colour(0))
    edge = brute_contour(pixels_HW, 1)
    np.testing.assert_array_equal(drawn[~pixels_HW], photo[~pixels_HW])
    np.testing.assert_array_equal(drawn[edge], np.broadcast_to(colour, (edge.sum(), 3)))
    inner = pixels_HW & ~edge
    blended = photo[inner].astype(np.float64) * (1 - OPACITY) + OPACITY * colour
    assert np.abs(drawn[inner] - blended).max() <= 0.5001


def test_the_photo_itself_is_left_as_it_was(photo: np.ndarray) -> None:
    before = photo.copy()
    photo.setflags(write=False)
    draw_overlay(photo, [mask(np.ones((40, 60), bool))], ImagePrompts(points=[(3, 3)], boxes=[(0, 0, 9, 9)]))
    np.testing.assert_array_equal(photo, before)


def test_of_overlapping_masks_the_smaller_is_on_top_whatever_their_order(photo: np.ndarray) -> None:
    large, small = block((40, 60), np.s_[5:35], np.s_[5:55]), block((40, 60), np.s_[10:20], np.s_[10:30])
    alone = draw_overlay(photo, [mask(small)], NOWHERE)
    over = draw_overlay(photo, [mask(small), mask(large)], NOWHERE)
    np.testing.assert_array_equal(over[small], alone[small])
    turned = draw_overlay(photo, [mask(large), mask(small)], NOWHERE)
    assert (turned[12, 12] != over[12, 12]).any(), "colours go by the mask's number"
    assert (turned[10, 10] == mask_colour(1)).all()


def test_an_empty_mask_leaves_the_photo(photo: np.ndarray) -> None:
    np.testing.assert_array_equal(draw_overlay(photo, [mask(np.zeros((40, 60), bool))], NOWHERE), photo)


def test_points_are_green_or_red_discs_with_a_white_ring_around_their_pixel(photo: np.ndarray) -> None:
    drawn = draw_overlay(photo, [], ImagePrompts(points=[(20, 10)], negative_points=[(45, 30)]))
    green, red = drawn[10, 20].astype(int), drawn[30, 45].astype(int)
    assert green[1] > green[0] + 100
    assert red[0] > red[1] + 100
    for x, y in ((20, 10), (45, 30)):
        ring = [drawn[y, x - 2], drawn[y, x + 2], drawn[y - 2, x], drawn[y + 2, x]]
        assert np.min(ring) > 200
    changed = np.argwhere((drawn != photo).any(axis=-1))
    reach = np.minimum(np.abs(changed - [10, 20]).max(axis=1), np.abs(changed - [30, 45]).max(axis=1))
    assert reach.max() <= 4


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3, 2), (900, 7)])
def test_prompts_in_the_corners_of_any_picture_are_drawn(size: tuple[int, int]) -> None:
    height, width = size
    photo = np.full((height, width, 3), 7, np.uint8)
    corners = [(0, 0), (width - 1, height - 1), (width - 0.01, 0)]
    prompts = ImagePrompts(points=corners, negative_points=[(0, height - 1)], boxes=[(0, 0, width, height)])
    drawn = draw_overlay(photo, [mask(np.ones(size, bool))], prompts)
    assert drawn.shape == photo.shape
    assert (drawn[0, 0] != 7).any()
    assert (drawn[-1, -1] != 7).any()


@pytest.mark.parametrize(
    "box", [(10, 5, 30, 25), (10.4, 4.6, 29.6, 25.4), (59.7, 39.7, 60, 40), (3, 3, 4, 4)]
)
def test_a_box_is_outlined_in_its_masks_colour_and_not_beyond_it(
    photo: np.ndarray, box: tuple[float, float, float, float]
) -> None:
    drawn = draw_overlay(photo, [], ImagePrompts(boxes=[(0, 0, 1, 1), box]))
    x0, y0, x1, y1 = (min(round(number), side) for number, side in zip(box, (59, 39, 60, 40), strict=True))
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
    assert (drawn[y0, x0:x1] == mask_colour(1)).all()
    assert (drawn[y1 - 1, x0:x1] == mask_colour(1)).all()
    assert (drawn[y0:y1, x0] == mask_colour(1)).all()
    assert (drawn[y0:y1, x1 - 1] == mask_colour(1)).all()
    outside = np.ones((40, 60), bool)
    outside[y0:y1, x0:x1] = outside[0, 0] = False
    np.testing.assert_array_equal(drawn[outside], photo[outside])


def test_neighbouring_colours_are_far_apart() -> None:
    for first, second in itertools.pairwise(range(50)):
        difference = np.subtract(mask_colour(first), mask_colour(second))
        assert np.abs(difference).max() > 100


def test_lines_are_two_pixels_wide_in_a_large_picture() -> None:
    photo = np.zeros((20, 900, 3), np.uint8)
    drawn = draw_overlay(photo, [mask(block((20, 900), np.s_[2:18], np.s_[100:800]))], NOWHERE)
    assert (drawn[2:4, 400] == mask_colour(0)).all()
    assert (drawn[4, 400] != mask_colour(0)).any()


@pytest.mark.parametrize(
    ("suffix", "kind", "tolerance"), [(".png", "PNG", 0), (".JPG", "JPEG", 30), (".jpeg", "JPEG", 30)]
)
def test_a_picture_is_written_in_the_format_of_its_name(suffix: str, kind: str, tolerance: int) -> None:
    smooth = np.asarray(Image.radial_gradient("L").convert("RGB"))
    image = Image.open(io.BytesIO(encode_picture(smooth, suffix)))
    assert image.format == kind
    assert np.abs(np.asarray(image).astype(int) - smooth).max() <= tolerance


def test_a_picture_too_large_for_jpeg_is_refused() -> None:
    check_format(".png", (10, 70_000))
    check_format(".jpg", (10, 65_500))
    with pytest.raises(PredictError, match=r"70000 x 10 pixels.*\.png"):
        check_format(".jpg", (10, 70_000))


def test_jpegs_limit_is_libjpegs() -> None:
    limit = np.zeros((1, 65_500, 3), np.uint8)
    assert encode_picture(limit, ".jpg")
