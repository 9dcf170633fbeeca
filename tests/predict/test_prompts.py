from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mobilesam.predict import PredictError
from mobilesam.predict.prompts import ImagePrompts

POINT, BOX = {"points": [(3, 4)]}, {"boxes": [(1, 2, 5, 6)]}


def test_all_points_and_the_one_box_prompt_one_object() -> None:
    (prompt,) = ImagePrompts(
        points=[(1, 2), (3, 4)], negative_points=[(5, 6)], boxes=[(0, 0, 9, 9)]
    ).objects()
    np.testing.assert_array_equal(prompt.coords_N2, [[1, 2], [3, 4], [5, 6]])
    np.testing.assert_array_equal(prompt.labels_N, [1, 1, 0])
    np.testing.assert_array_equal(prompt.box_4, [0, 0, 9, 9])
    assert not prompt.ambiguous


def test_several_boxes_prompt_an_object_each() -> None:
    prompts = ImagePrompts(boxes=[(0, 0, 9, 9), (1, 1, 2, 2)]).objects()
    assert [prompt.box_4.tolist() for prompt in prompts] == [[0, 0, 9, 9], [1, 1, 2, 2]]
    assert all(prompt.coords_N2 is None and not prompt.ambiguous for prompt in prompts)


@pytest.mark.parametrize(
    ("prompts", "ambiguous"),
    [(POINT, True), (POINT | BOX, False), (POINT | {"negative_points": [(1, 1)]}, False), (BOX, False)],
)
def test_only_one_point_by_itself_is_ambiguous(prompts: dict[str, Any], ambiguous: bool) -> None:
    assert [prompt.ambiguous for prompt in ImagePrompts(**prompts).objects()] == [ambiguous]


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ({}, "nothing to segment"),
        ({"negative_points": [(1, 1), (2, 2)]}, "2 negative points alone"),
        ({"points": [(1, 1)], "boxes": [(0, 0, 1, 1), (0, 0, 2, 2)]}, "1 point with 2 boxes"),
        ({"negative_points": [(1, 1)], "boxes": [(0, 0, 1, 1), (0, 0, 2, 2)]}, "1 point with 2 boxes"),
        ({"everything": True} | POINT | BOX, "1 point and 1 box"),
        ({"boxes": [(5, 2, 5, 6)]}, "--box 5 2 5 6 is empty"),
        ({"boxes": [(1, 7, 5, 6)]}, "--box 1 7 5 6 is empty"),
        ({"points": [(float("nan"), 1)]}, "nan 1 holds a number that isn't finite"),
        ({"points": [(1, float("inf"))]}, "isn't finite"),
        ({"boxes": [(1, 2, 3)]}, "1 2 3 has 3 numbers, not 4"),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_numbers(prompts: dict[str, Any], told: str) -> None:
    with pytest.raises(PredictError) as raised:
        ImagePrompts(**prompts)
    assert told in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "prompts",
    [
        {"points": [(0, 0), (59.9, 39.9)]},
        {"boxes": [(0, 0, 60, 40)]},
        {"boxes": [(59, 39, 60, 40)], "negative_points": [(59, 39)]},
        {"everything": True},
    ],
)
def test_prompts_on_the_very_edge_are_inside(prompts: dict[str, Any]) -> None:
    given = ImagePrompts(**prompts)
    assert given.inside((40, 60)) == (given, [])


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ({"points": [(1, 1), (60, 1)]}, "--point 60 1 is outside the image, which is 60 x 40 pixels"),
        ({"points": [(1, 40)]}, "--point 1 40 is outside"),
        ({"points": [(-0.5, 4)]}, "--point -0.5 4 is outside"),
        ({"points": [(1, 1)], "negative_points": [(1, 45)]}, "--negative-point 1 45 is outside"),
        ({"boxes": [(60, 0, 70, 40)]}, "--box 60 0 70 40 is outside"),
        ({"boxes": [(0, -9, 60, 0)]}, "--box 0 -9 60 0 is outside"),
        ({"boxes": [(0, 0, 1, 1), (0, 40, 1, 123456.75)]}, "--box 0 40 1 123456.75 is outside"),
    ],
)
def test_prompts_outside_the_image_are_refused_with_both_sizes(prompts: dict[str, Any], told: str) -> None:
    with pytest.raises(PredictError) as raised:
        ImagePrompts(**prompts).inside((40, 60))
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ((-2, 10, 60, 20), (0, 10, 60, 20)),
        ((0, 0, 60.5, 40), (0, 0, 60, 40)),
        ((-1000, -1000, 1000, 1000), (0, 0, 60, 40)),
        ((59, -1, 61, 0.5), (59, 0, 60, 0.5)),
    ],
)
def test_a_box_that_reaches_over_the_edge_is_clipped_and_the_note_names_both(
    box: tuple[float, ...], clipped: tuple[float, ...]
) -> None:
    kept = (1.0, 1.0, 2.0, 2.0)
    prompts, notes = ImagePrompts(boxes=[kept, box]).inside((40, 60))
    assert prompts.boxes == (kept, clipped)
    (note,) = notes
    assert note.startswith(f"--box {' '.join(f'{number:g}' for number in box)} reaches over the edge")
    assert "60 x 40 pixels" in note
    assert note.endswith(f"clipped to {' '.join(f'{number:g}' for number in clipped)}")
