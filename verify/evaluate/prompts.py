"""Which prompts an evaluation gives: points and pairs of points of the whole image, boxes and centres of objects.

Coordinates are pixels of the original image, x and y. What is drawn at random comes from the seed and the image's key
alone, so that neither the order nor the other images matter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...distill.metrics.masks import grid_points

Floats = npt.NDArray[np.floating]

DIRECTIONS = 32
"""Directions that are drawn for a pair's second point before the pair counts as not fitting into the image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """N prompts of one image, each by itself: P points each, or a box each."""

    points_NP2: Floats | None = None
    labels_NP: npt.NDArray[np.int64] | None = None
    """1 on the object, 0 beside it."""
    boxes_N4: Floats | None = None
    """x0, y0, x1, y1."""

    @classmethod
    def of_points(cls, points_N2: Floats) -> Prompts:
        """A foreground point each."""
        labels_N1 = np.ones((len(points_N2), 1), dtype=np.int64)
        return cls(points_NP2=np.asarray(points_N2, dtype=np.float64)[:, None], labels_NP=labels_N1)

    def __len__(self) -> int:
        values = self.boxes_N4 if self.points_NP2 is None else self.points_NP2
        assert values is not None, "prompts are points or boxes"
        return len(values)

    def take(self, chosen: slice) -> Prompts:
        """Some of them."""
        return Prompts(
            points_NP2=None if self.points_NP2 is None else self.points_NP2[chosen],
            labels_NP=None if self.labels_NP is None else self.labels_NP[chosen],
            boxes_N4=None if self.boxes_N4 is None else self.boxes_N4[chosen],
        )

    def parts(self, at_once: int) -> Iterator[tuple[slice, Prompts]]:
        """All of them in order, at most `at_once` at a time, and where they are."""
        for start in range(0, len(self), at_once):
            chosen = slice(start, min(start + at_once, len(self)))
            yield chosen, self.take(chosen)


def point_prompts(side: int, size: tuple[int, int]) -> Prompts:
    """One foreground point each: the centres of side x side equal parts of an image of `size` (height, width)."""
    return Prompts.of_points(grid_points(side, size))


def pair_prompts(
    side: int, size: tuple[int, int], distance: float, seed: int, key: str
) -> tuple[Prompts, int]:
    """A foreground point each, as `point_prompts`, and a background point `distance` pixels from it.

    Its direction is drawn: the first of DIRECTIONS uniform ones that leads to a point of the image. Returns the
    pairs, the foreground point first, and how many were left out since none of their directions did.
    """
    height, width = size
    rng = seeded(seed, f"pair {distance:g}", key)
    pairs, left_out = [], 0
    for x, y in grid_points(side, size):
        # Always the same number of draws: a pair doesn't depend on what became of the others.
        angles = rng.uniform(0, 2 * math.pi, DIRECTIONS)
        ends_D2 = np.stack([x + distance * np.cos(angles), y + distance * np.sin(angles)], axis=-1)
        inside_D = ((ends_D2 >= 0) & (ends_D2 <= (width - 1, height - 1))).all(axis=1)
        if inside_D.any():
            pairs.append([(x, y), ends_D2[int(inside_D.argmax())]])
        else:
            left_out += 1
    points_N22 = np.array(pairs, dtype=np.float64).reshape(-1, 2, 2)
    labels_N2 = np.tile(np.array([1, 0], dtype=np.int64), (len(pairs), 1))
    return Prompts(points_NP2=points_N22, labels_NP=labels_N2), left_out


def choose_objects(count: int, most: int, seed: int, key: str) -> list[int]:
    """Which of an image's objects are looked at: all, or `most` of them, drawn, in order."""
    if count <= most:
        return list(range(count))
    return sorted(seeded(seed, "objects", key).choice(count, most, replace=False).tolist())


def seeded(seed: int, purpose: str, key: str) -> np.random.Generator:
    """Random numbers that follow from these three alone, on every machine."""
    text = f"{seed}\0{purpose}\0".encode() + key.encode("utf-8", "surrogateescape")
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(text).digest()[:16], "big")))


# --- The point of a mask that is farthest from its boundary: the centre that a user would click on.

Ints = npt.NDArray[np.int64]

AT_ONCE = 1024
"""Pixels whose distances are computed together."""


def centre_of_mask(mask_HW: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """x and y of the pixel that is farthest, by Euclid, from the nearest pixel outside the mask.

    Of several it is the first, row by row. Beyond the image's edge everything is outside.

    That is the centre point of EdgeSAM's evaluation (`get_centroid_from_mask`), whose distances are approximate;
    these are exact. The mask must have a pixel.
    """
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    cropped = mask_HW[top : rows[-1] + 1, left : columns[-1] + 1]
    y, x = _innermost(np.pad(cropped, 1))
    return left + x - 1, top + y - 1


def _innermost(mask_HW: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """As `centre_of_mask`, y first, for a mask with a border of zeros.

    A pixel's steps to the nearest zero in eight directions bound its distance from above. Pixels are looked at by
    falling bound, until no bound reaches the greatest distance found: few of them have to be measured.
    """
    down_HW = _steps_from_above(mask_HW)
    up_HW = _steps_from_above(mask_HW[::-1])[:, ::-1]
    across_HW = np.minimum(_steps_from_above(mask_HW.T)[0].T, _steps_from_above(mask_HW.T[::-1])[0, ::-1].T)
    vertical_HW = np.minimum(down_HW[0], up_HW[0])
    straight_HW = np.minimum(vertical_HW, across_HW)
    diagonal_HW = np.minimum(down_HW[1:].min(axis=0), up_HW[1:].min(axis=0))
    bounds = np.minimum(straight_HW**2, 2 * diagonal_HW**2).ravel()
    order = np.argsort(-bounds, kind="stable")
    best, place = -1, 0
    for start in range(0, len(order), AT_ONCE):
        some = order[start : start + AT_ONCE]
        if bounds[some[0]] < best:
            break
        squares = _squared_distances(vertical_HW, some, int(bounds[some[0]]))
        greatest = int(squares.max())
        first = int(some[squares == greatest].min())
        if greatest > best or (greatest == best and first < place):
            best, place = greatest, first
    return divmod(place, mask_HW.shape[1])


def _steps_from_above(mask_HW: npt.NDArray[np.bool_]) -> Ints:
    """Steps to the nearest zero straight up, up to the left and up to the right: int64 (3, H, W)."""
    steps_3HW = np.zeros((3, *mask_HW.shape), dtype=np.int64)
    for y in range(1, len(mask_HW)):
        before_3W = steps_3HW[:, y - 1]
        steps_3HW[0, y] = before_3W[0] + 1
        steps_3HW[1, y, 1:] = before_3W[1, :-1] + 1
        steps_3HW[2, y, :-1] = before_3W[2, 1:] + 1
        steps_3HW[:, y] *= mask_HW[y]
    return steps_3HW


def _squared_distances(vertical_HW: Ints, places: Ints, bound: int) -> Ints:
    """Squared distances to the nearest zero of pixels by their places in the flat mask, of which none is greater than
    `bound`: the least, over the columns that are near enough, of the step there and the steps up or down in it."""
    width = vertical_HW.shape[1]
    reach = int(np.sqrt(bound)) + 1
    y_n1, x_n1 = places[:, None] // width, places[:, None] % width
    columns_nK = np.clip(x_n1 + np.arange(-reach, reach + 1), 0, width - 1)
    return ((columns_nK - x_n1) ** 2 + vertical_HW[y_n1, columns_nK] ** 2).min(axis=1)
