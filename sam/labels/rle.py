"""COCO's run-length encoding (RLE) of masks, checked before pycocotools' C code, which checks nothing.

A mask's pixels are read column by column; its runs are the alternating lengths of zeros and ones, zeros first. In the
compressed form each run from the fourth on is the difference from the run two before it. It is written in letters of
five bits, the lowest first, with a sixth bit set if more letters follow and the sign extended from the last letter.
Source: pycocotools, maskApi.c.

Shape suffixes: N corners of a polygon or runs of a mask, 2 (x, y), 6 letters of a run (MOST_LETTERS).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from ...common.errors import BadAnnotation

Runs = npt.NDArray[np.int64]

MOST_LETTERS = 6
"""Most letters of one run: enough for 2 ** 28 pixels, and the most that maskApi.c can shift within an int."""

SCALE = 5
"""Factor of the resolution at which maskApi.c draws polygons."""

MOST_STEPS = 10_000_000
"""Greatest length of an object's outline at that resolution: 100,000 is a long one, and each step takes memory."""

NO_OUTLINE = "no outline"
FEW_CORNERS = "outline of fewer than three corners"
BAD_OUTLINE = "outline that can't be drawn"
BAD_RLE = "RLE that doesn't decode to the image's size"

_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")

MOST_RUNS = 2**20
"""Most runs of one mask: an object has a few thousand, and a million, which take much memory, are noise."""


def number(value: object) -> float | int | None:
    """Return a number of JSON, or the one that a text of JSON holds; None for anything else.

    Args:
        value: value from JSON; numbers may be of any size, infinite, or NaN.
    """
    if type(value) in (int, float):
        return value  # type: ignore[return-value]
    if isinstance(value, str) and len(value) < 40 and _NUMBER.fullmatch(value):
        return int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
    return None


def whole_number(value: object) -> int | None:
    """Return an integer of JSON, also if it is written as 128.0 or as a text; None for anything else.

    Args:
        value: value from JSON.
    """
    found = number(value)
    if isinstance(found, float):
        return int(found) if found.is_integer() else None
    return found


def checked_runs(segmentation: object, size: tuple[int, int]) -> Runs:
    """Read and check the runs of a mask.

    Args:
        segmentation: value from COCO's JSON: compressed or uncompressed RLE, or polygons; also a single polygon, or a
            list of one RLE.
        size: (height, width) of the image in pixels.

    Returns:
        int64 (N,), whose sum is height * width.

    Raises:
        BadAnnotation: `segmentation` is anything else.
    """
    if isinstance(segmentation, list) and len(segmentation) == 1 and isinstance(segmentation[0], dict):
        segmentation = segmentation[0]
    if isinstance(segmentation, list):
        return _polygon_runs(segmentation, size)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise BadAnnotation(
            "a segmentation is neither RLE with size and counts nor polygons",
            BAD_OUTLINE if segmentation else NO_OUTLINE,
        )
    try:
        return _rle_runs(segmentation["size"], segmentation["counts"], size)
    except BadAnnotation as error:
        raise BadAnnotation(str(error), BAD_RLE) from error


def _rle_runs(stated: object, counts: object, size: tuple[int, int]) -> Runs:
    """Return the runs of RLE, compressed or not."""
    if not isinstance(stated, list) or [whole_number(each) for each in stated] != list(size):
        raise BadAnnotation(f"RLE of size {str(stated)[:40]}, the image is {list(size)}")
    if isinstance(counts, str):
        runs = read_runs(counts)
    elif isinstance(counts, list):
        runs = _listed_runs(counts)
    else:
        raise BadAnnotation(f"RLE counts are a {type(counts).__name__}")
    return _checked_total(runs, size)


def read_runs(counts: str) -> Runs:
    """Decode compressed counts.

    Args:
        counts: compressed counts as in COCO's JSON.

    Returns:
        int64 (N,); runs may be negative if the counts are damaged.

    Raises:
        BadAnnotation: the counts can't be decoded.
    """
    if len(counts) > MOST_RUNS * MOST_LETTERS:
        raise BadAnnotation(
            f"RLE counts of {len(counts):,} letters, at most {MOST_RUNS * MOST_LETTERS:,} are read"
        )
    letters = np.frombuffer(counts.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int64) - 48
    if not len(letters) or letters.min() < 0 or letters.max() > 63:
        raise BadAnnotation(
            "RLE counts have characters that are not valid in RLE" if len(letters) else "RLE counts are empty"
        )
    ends = np.flatnonzero(letters & 32 == 0)
    lengths = np.diff(ends, prepend=-1)
    if not len(ends) or ends[-1] != len(letters) - 1:
        raise BadAnnotation("RLE counts end within a run")
    if lengths.max() > MOST_LETTERS:
        raise BadAnnotation(
            f"RLE counts have a run of {lengths.max()} letters, at most {MOST_LETTERS} are read"
        )
    starts = ends - lengths + 1
    places = 5 * (np.arange(len(letters)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((letters & 31) << places, starts)
    runs -= np.where(letters[ends] & 16, 1 << (5 * lengths), 0)
    # Runs from the fourth on are differences from the run two before, so even and odd ones are summed separately.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def write_runs(runs: Runs) -> str:
    """Encode runs, each of fewer than 2 ** 28 pixels, as compressed counts, identical to those of pycocotools."""
    steps = runs.copy()
    steps[3:] -= runs[1:-2]
    places = np.arange(MOST_LETTERS)
    parts_N6 = steps[:, None] >> (5 * places)
    # A run ends with the first letter whose highest bit is the sign, if all bits above it are the sign, too.
    rest_N6, sign_N6 = parts_N6 >> 5, (parts_N6 >> 4) & 1
    more_N6 = rest_N6 != -sign_N6
    letters_N6 = (parts_N6 & 31) + 32 * more_N6 + 48
    used_N6 = places <= (~more_N6).argmax(axis=1)[:, None]
    return letters_N6[used_N6].astype(np.uint8).tobytes().decode("ascii")


def runs_box(runs: Runs, height: int) -> tuple[float, float, float, float]:
    """Return the box around the pixels of a mask, as pycocotools' `toBbox` does.

    Args:
        runs: runs of the mask, at least one of them of ones.
        height: rows of the mask.

    Returns:
        x0, y0, x1, y1 in pixels.
    """
    ends = np.cumsum(runs)
    first, last = (ends - runs)[1::2], ends[1::2] - 1
    first, last = first[runs[1::2] > 0], last[runs[1::2] > 0]
    columns, rows = (first // height, last // height), (first % height, last % height)
    # A run that goes on in the next column holds the last row of one and the first row of the other.
    over = bool((columns[0] != columns[1]).any())
    top, bottom = (0, height) if over else (int(rows[0].min()), int(rows[1].max()) + 1)
    return float(columns[0].min()), float(top), float(columns[1].max()) + 1, float(bottom)


def _listed_runs(counts: list[Any]) -> Runs:
    """Return the runs of uncompressed RLE."""
    if not counts:
        raise BadAnnotation("RLE counts are empty")
    numbers = [whole_number(count) for count in counts]
    if any(count is None or not 0 <= count < 2**31 for count in numbers):
        raise BadAnnotation("RLE counts hold values other than numbers of pixels")
    return np.array(numbers, dtype=np.int64)


def _checked_total(runs: Runs, size: tuple[int, int]) -> Runs:
    """Return the runs if they cover an image of `size` (height, width) exactly."""
    if len(runs) > MOST_RUNS:
        raise BadAnnotation(f"{len(runs):,} runs in a mask, at most {MOST_RUNS:,} are read")
    if runs.min() < 0:
        raise BadAnnotation(f"RLE counts have a run of {runs.min():,} pixels")
    if (total := int(runs.sum())) != size[0] * size[1]:
        raise BadAnnotation(f"RLE counts add up to {total:,} pixels, the image has {size[0] * size[1]:,}")
    return runs


def _polygon_runs(segmentation: list[Any], size: tuple[int, int]) -> Runs:
    """Draw all polygons of one object into one mask. A polygon of fewer than three corners has no area: it is left
    out if there is another one."""
    from pycocotools import mask as coco

    if not segmentation:
        raise BadAnnotation("a segmentation has no polygon", NO_OUTLINE)
    steps, drawn = 0.0, []
    for polygon in _polygons(segmentation):
        corners_N2 = _corners(polygon, size)
        if len(corners_N2) < 3:
            continue
        moves_N2 = np.abs(corners_N2 - np.roll(corners_N2, -1, axis=0))
        steps += SCALE * float(moves_N2.max(axis=1).sum()) + len(moves_N2)
        drawn.append(corners_N2.ravel().tolist())
    if not drawn:
        raise BadAnnotation("a polygon is not a list of three or more corners, x and y of each", FEW_CORNERS)
    if steps > MOST_STEPS:
        raise BadAnnotation(f"polygons with boundaries of {steps / SCALE:,.0f} pixels", BAD_OUTLINE)
    merged = coco.merge(coco.frPyObjects(drawn, *size))
    try:
        return _checked_total(read_runs(merged["counts"].decode("ascii")), size)
    except BadAnnotation as error:
        raise BadAnnotation(str(error), BAD_OUTLINE) from error


def _polygons(segmentation: list[Any]) -> list[Any]:
    """Return the polygons of a segmentation, each as a flat list: some tools write the only polygon without the list
    around it, or each corner as a pair or as an object with x and y."""
    segmentation = [
        [_pair(corner) for corner in part] if isinstance(part, list) else _pair(part) for part in segmentation
    ]
    if not any(isinstance(part, list) for part in segmentation):
        return [segmentation]
    if len(segmentation) > 2 and _are_pairs(segmentation):
        return [[value for pair in segmentation for value in pair]]
    return [
        [value for pair in part for value in pair] if isinstance(part, list) and _are_pairs(part) else part
        for part in segmentation
    ]


def _pair(corner: Any) -> Any:
    """Return a corner that is an object with x and y as a pair, anything else unchanged."""
    return [corner["x"], corner["y"]] if isinstance(corner, dict) and {"x", "y"} <= corner.keys() else corner


def _are_pairs(parts: list[Any]) -> bool:
    return bool(parts) and all(isinstance(part, list) and len(part) == 2 for part in parts)


def _corners(polygon: object, size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Return x, y of each corner, float64 (N, 2). Corners more than the image's longest side outside it are refused,
    since they could overflow C's int."""
    numbers = [number(value) for value in polygon] if isinstance(polygon, list) else [None]
    if len(numbers) % 2 or None in numbers:
        raise BadAnnotation("a polygon is not a list of three or more corners, x and y of each", BAD_OUTLINE)
    try:
        corners_N2 = np.array(numbers, dtype=np.float64).reshape(-1, 2)
    except OverflowError:
        raise BadAnnotation("a polygon has a corner far outside the image", BAD_OUTLINE) from None
    margin = max(size)
    if not bool(np.all((corners_N2 >= -margin) & (corners_N2 <= np.array(size[::-1]) + margin))):
        raise BadAnnotation("a polygon has a corner far outside the image", BAD_OUTLINE)
    return corners_N2
