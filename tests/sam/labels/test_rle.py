from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco

from mobilesam.common.errors import BadAnnotation
from mobilesam.sam.labels import rle
from mobilesam.sam.labels.rle import checked_runs, read_runs, runs_box, write_runs

masks = arrays.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.booleans())


def encoded(mask_HW: np.ndarray) -> str:
    return coco.encode(np.asfortranarray(mask_HW, dtype=np.uint8))["counts"].decode()


def counted(mask_HW: np.ndarray) -> list[int]:
    """Runs by walking over the pixels."""
    runs, value = [0], False
    for pixel in mask_HW.T.ravel():
        if bool(pixel) != value:
            runs.append(0)
            value = not value
        runs[-1] += 1
    return runs


@given(masks)
def test_runs_are_those_counted_pixel_by_pixel(mask_HW: np.ndarray) -> None:
    assert read_runs(encoded(mask_HW)).tolist() == counted(mask_HW)


@given(masks)
def test_compressed_counts_are_pycocotools_own_letters(mask_HW: np.ndarray) -> None:
    assert write_runs(np.array(counted(mask_HW))) == encoded(mask_HW)


@given(st.lists(st.integers(0, 2**28 - 1), min_size=1, max_size=30))
def test_runs_of_any_length_are_read_as_they_were_written(runs: list[int]) -> None:
    assert read_runs(write_runs(np.array(runs))).tolist() == runs


@pytest.mark.parametrize("sizes", [[200_000_000], [0, 16_777_216, 5, 15], [15, 16, 511, 512, 0, 1]])
def test_long_runs_are_the_letters_that_pycocotools_writes(sizes: list[int]) -> None:
    # Its own encoder of lists needs no pixels.
    wanted = coco.frPyObjects({"size": [1, sum(sizes)], "counts": sizes}, 1, sum(sizes))["counts"].decode()
    assert write_runs(np.array(sizes)) == wanted
    assert read_runs(wanted).tolist() == sizes


@given(masks)
def test_lists_of_counts_are_the_same_mask(mask_HW: np.ndarray) -> None:
    height, width = mask_HW.shape
    listed = {"size": [height, width], "counts": counted(mask_HW)}
    assert checked_runs(listed, (height, width)).tolist() == counted(mask_HW)


def test_polygons_of_one_object_are_one_mask_as_pycocotools_draws_them() -> None:
    polygons = [[2, 2, 20.5, 3, 10, 18.2], [25.0, 5, 38, 5, 38, 25, 25, 25], [-3, 30, 60, 30, 60, 45, -3, 45]]
    wanted = coco.decode(coco.merge(coco.frPyObjects(polygons, 40, 50)))
    assert checked_runs(polygons, (40, 50)).tolist() == counted(wanted)
    assert 0 < wanted.sum() < wanted.size


RING = [2, 2, 20.5, 3, 10, 18.2, 4, 12]
PAIRS = [RING[i : i + 2] for i in range(0, 8, 2)]


@pytest.mark.parametrize(
    "segmentation",
    [
        RING, [*map(str, RING)], PAIRS, [PAIRS], [RING, [20, 20, 21, 21]], [[], RING], [[5, 5], RING],
        [RING, PAIRS], [[*RING, *RING[:2]]],
    ],
)  # fmt: skip
def test_outlines_as_exporters_write_them_are_drawn_as_pycocotools_draws_the_ring(segmentation: Any) -> None:
    wanted = coco.decode(coco.merge(coco.frPyObjects([RING], 40, 50)))
    assert checked_runs(segmentation, (40, 50)).tolist() == counted(wanted)


def test_rle_with_numbers_as_texts_or_floats_is_read() -> None:
    wanted = [1, 2, 17]
    assert checked_runs({"size": ["4", 5.0], "counts": ["1", 2.0, 17]}, (4, 5)).tolist() == wanted


@given(masks)
def test_the_box_of_runs_is_pycocotools_own(mask_HW: np.ndarray) -> None:
    if not mask_HW.any():
        return
    x, y, width, height = coco.toBbox(coco.encode(np.asfortranarray(mask_HW, dtype=np.uint8))).tolist()
    assert runs_box(np.array(counted(mask_HW)), len(mask_HW)) == (x, y, x + width, y + height)


@given(st.lists(st.tuples(st.floats(-5, 55), st.floats(-5, 45)), min_size=3, max_size=9))
def test_any_polygon_is_drawn_as_pycocotools_draws_it(corners: list[tuple[float, float]]) -> None:
    flat = [value for corner in corners for value in corner]
    wanted = coco.decode(coco.frPyObjects([flat], 40, 50))[..., 0]
    assert checked_runs([flat], (40, 50)).tolist() == counted(wanted)


def test_polygons_and_rle_are_read_as_other_programs_wrap_them() -> None:
    wanted = checked_runs([[1, 1, 8, 1, 8, 6]], (10, 12)).tolist()
    corners = [{"x": 1, "y": 1}, {"x": 8, "y": "1"}, {"x": 8, "y": 6}]
    for segmentation in (
        corners,
        [corners],
        [[[1, 1], [8, 1], [8, 6]]],
        [{"size": [10, 12], "counts": wanted}],
    ):
        assert checked_runs(segmentation, (10, 12)).tolist() == wanted


BROKEN: dict[str, tuple[Any, str]] = {
    "nothing": (None, "neither RLE with size and counts nor polygons"),
    "no counts": ({"size": [4, 5]}, "neither RLE"),
    "another size": ({"size": [5, 4], "counts": "d0"}, r"RLE of size \[5, 4\], the image is \[4, 5\]"),
    "a size of text": ({"size": "4x5", "counts": "d0"}, "RLE of size 4x5"),
    "empty counts": ({"size": [4, 5], "counts": ""}, "empty"),
    "foreign letters": ({"size": [4, 5], "counts": "d0\n"}, "characters that are not valid in RLE"),
    "letters of two bytes": ({"size": [4, 5], "counts": "dé"}, "characters that are not valid in RLE"),
    "half a character": ({"size": [4, 5], "counts": "d\ud800"}, "characters that are not valid in RLE"),
    "an unfinished run": ({"size": [4, 5], "counts": "d"}, "end within a run"),
    "an endless run": ({"size": [4, 5], "counts": "o" * 70 + "0"}, "a run of 71 letters, at most 6"),
    "a negative run": ({"size": [4, 5], "counts": "O"}, "a run of -1 pixels"),
    "too few pixels": ({"size": [4, 5], "counts": "3"}, "add up to 3 pixels, the image has 20"),
    "too many pixels": ({"size": [4, 5], "counts": "33333333333"}, "add up to .* the image has 20"),
    "an empty list": ({"size": [4, 5], "counts": []}, "empty"),
    "a list of negatives": ({"size": [4, 5], "counts": [-1, 21]}, "values other than numbers of pixels"),
    "a list with a huge one": ({"size": [4, 5], "counts": [2**70]}, "values other than numbers of pixels"),
    "a list of texts": ({"size": [4, 5], "counts": ["a"]}, "values other than numbers of pixels"),
    "a list of booleans": ({"size": [1, 1], "counts": [False, True]}, "RLE of size|values other"),
    "counts of another kind": ({"size": [4, 5], "counts": 20}, "counts are a int"),
    "no polygon": ([], "no polygon"),
    "a polygon of two corners": ([[0, 0, 1, 1]], "three or more corners"),
    "half a corner": ([[0, 0, 1, 1, 2, 2, 3]], "three or more corners"),
    "corners of text": ([["a"] * 6], "three or more corners"),
    "words where polygons are": (["left", "right"], "three or more corners"),
    "two pairs": ([[0, 0], [4, 4]], "three or more corners"),
    "a corner that is no number": ([[0, 0, 1, 1, 2, float("nan")]], "far outside"),
    "an infinite corner": ([[0, 0, 1, 1, 2, float("inf")]], "far outside"),
    "a huge corner": ([[0, 0, 1, 1, 2, 10**400]], "far outside"),
    "a far corner": ([[0, 0, 1, 1, 2, 1e9]], "far outside"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_segmentation_that_is_no_mask_is_refused_with_the_fact(name: str) -> None:
    segmentation, message = BROKEN[name]
    with pytest.raises(BadAnnotation, match=message):
        checked_runs(segmentation, (4, 5))


def test_more_runs_or_longer_outlines_than_fit_in_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rle, "MOST_RUNS", 10)
    with pytest.raises(BadAnnotation, match=r"counts of 61 letters, at most 60"):
        read_runs("0" * 61)
    with pytest.raises(BadAnnotation, match=r"20 runs in a mask, at most 10"):
        checked_runs({"size": [4, 5], "counts": [1] * 20}, (4, 5))
    monkeypatch.setattr(rle, "MOST_STEPS", 100)
    with pytest.raises(BadAnnotation, match=r"boundaries of \d+ pixels"):
        checked_runs([[0, 0, 4, 0, 4, 3] * 20], (4, 5))


@given(st.text(alphabet=[chr(48 + i) for i in range(64)], max_size=40))
def test_no_counts_at_all_get_past_the_check_and_fail_in_pycocotools(counts: str) -> None:
    segmentation = {"size": [4, 5], "counts": counts}
    try:
        runs = checked_runs(segmentation, (4, 5))
    except BadAnnotation:
        return
    mask_HW = coco.decode({"size": [4, 5], "counts": write_runs(runs)})
    assert mask_HW.shape == (4, 5)
    assert int(mask_HW.sum()) == int(runs[1::2].sum())
