"""COCO's run-length encoding (RLE) of masks, checked before pycocotools' C code, which checks nothing.

A mask's pixels are read column by column; its runs are the alternating lengths of zeros and ones, zeros first. In the
compressed form each run from the fourth on is the difference from the run two before it. It is written in letters of
five bits, the lowest first, with a sixth bit set if more letters follow and the sign extended from the last letter.
Source: pycocotools, maskApi.c.

Shape suffixes: N corners of a polygon or runs of a mask, 2 (x, y), 6 letters of a run (MOST_LETTERS).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.errors import BadAnnotation

Runs = npt.NDArray[np.int64]

MOST_LETTERS = 6
"""Most letters of one run: enough for 2 ** 28 pixels, and the most that maskApi.c can shift within an int."""

SCALE = 5
"""Factor of the resolution at which maskApi.c draws polygons."""

MOST_STEPS = 10_000_000
"""Greatest length of an object's outline at that resolution: 100,000 is a long one, and each step takes memory."""

MOST_RUNS = 2**20
"""Most runs of one mask: an object has a few thousand, and a million, which take much memory, are noise."""


def checked_runs(segmentation: object, size: tuple[int, int]) -> Runs:
    """Read and check the runs of a mask.

    Args:
        segmentation: value from COCO's JSON: compressed or uncompressed RLE, or polygons.
        size: (height, width) of the image in pixels.

    Returns:
        int64 (N,), whose sum is height * width.

    Raises:
        BadAnnotation: `segmentation` is anything else.
    """
    if isinstance(segmentation, list):
        return _polygon_runs(segmentation, size)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise BadAnnotation("a segmentation is neither RLE with size and counts nor polygons")
    if segmentation["size"] != list(size):
        raise BadAnnotation(f"RLE of size {str(segmentation['size'])[:40]}, the image is {list(size)}")
    counts = segmentation["counts"]
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


def _listed_runs(counts: list[Any]) -> Runs:
    """Return the runs of uncompressed RLE."""
    if not counts:
        raise BadAnnotation("RLE counts are empty")
    if any(type(count) is not int or not 0 <= count < 2**31 for count in counts):
        raise BadAnnotation("RLE counts hold values other than numbers of pixels")
    return np.array(counts, dtype=np.int64)


def _checked_total(runs: Runs, size: tuple[int, int]) -> Runs:
    """Return the runs if they cover an image of `size` (height, width) exactly."""
    if len(runs) > MOST_RUNS:
        raise BadAnnotation(f"{len(runs):,} runs in a mask, at most {MOST_RUNS:,} are read")
    if runs.min() < 0:
        raise BadAnnotation(f"RLE counts have a run of {runs.min():,} pixels")
    if (total := int(runs.sum())) != size[0] * size[1]:
        raise BadAnnotation(f"RLE counts add up to {total:,} pixels, the image has {size[0] * size[1]:,}")
    return runs


def _polygon_runs(polygons: list[Any], size: tuple[int, int]) -> Runs:
    """Draw all polygons of one object into one mask."""
    from pycocotools import mask as coco

    if not polygons:
        raise BadAnnotation("a segmentation has no polygon")
    steps, checked = 0.0, []
    for polygon in polygons:
        corners_N2 = _corners(polygon, size)
        moves_N2 = np.abs(corners_N2 - np.roll(corners_N2, -1, axis=0))
        steps += SCALE * float(moves_N2.max(axis=1).sum()) + len(moves_N2)
        checked.append(corners_N2.ravel().tolist())
    if steps > MOST_STEPS:
        raise BadAnnotation(f"polygons with boundaries of {steps / SCALE:,.0f} pixels")
    merged = coco.merge(coco.frPyObjects(checked, *size))
    return _checked_total(read_runs(merged["counts"].decode("ascii")), size)


def _corners(polygon: object, size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Return x, y of each corner, float64 (N, 2). Corners more than the image's longest side outside it are refused,
    since they could overflow C's int."""
    numbers = polygon if isinstance(polygon, list) else []
    if len(numbers) < 6 or len(numbers) % 2 or any(type(number) not in (int, float) for number in numbers):
        raise BadAnnotation("a polygon is not a list of three or more corners, x and y of each")
    try:
        corners_N2 = np.array(numbers, dtype=np.float64).reshape(-1, 2)
    except OverflowError:
        raise BadAnnotation("a polygon has a corner far outside the image") from None
    margin = max(size)
    if not bool(np.all((corners_N2 >= -margin) & (corners_N2 <= np.array(size[::-1]) + margin))):
        raise BadAnnotation("a polygon has a corner far outside the image")
    return corners_N2
