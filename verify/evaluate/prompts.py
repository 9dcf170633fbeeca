"""Prompts of an evaluation: points and pairs of points over the whole image, boxes and centres of labelled objects.

Coordinates are x, y in pixels of the original image. Random draws depend only on the seed and the image's key, not on
the order of images or on other images.

Shape suffixes: P prompts, N points of one prompt, H and W rows and columns of a mask, L pixels of a flattened mask or
directions of a draw, X columns of a window, 2 (x, y), 3 three directions, 1 one.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch

from ...distill.metrics.masks import grid_points
from ...sam.modeling.decode_prompts import Prompts

Ints = npt.NDArray[np.int64]

DIRECTIONS = 32
"""Number of directions drawn for a pair's second point; if none leads into the image, the pair is left out."""

PIXELS_AT_ONCE = 1024
"""Number of pixels of a mask whose distances are computed together."""


def point_prompts(side: int, size: tuple[int, int]) -> Prompts:
    """Return prompts of one foreground point each: the centres of side x side equal parts of an image.

    Args:
        side: number of parts in each direction.
        size: height and width of the image in pixels.

    Returns:
        side * side prompts, row by row, with float64 coordinates.
    """
    return Prompts.of_points(grid_points(side, size))


def pair_prompts(
    side: int, size: tuple[int, int], distance: float, seed: int, key: str
) -> tuple[Prompts, int]:
    """Return pairs of a foreground point, as in `point_prompts`, and a background point at a distance from it.

    The direction is random: the first of DIRECTIONS uniformly drawn ones that leads to a point in the image.

    Args:
        side: number of parts of the image in each direction.
        size: height and width of the image in pixels.
        distance: distance between the two points in pixels.
        seed: seed of the evaluation.
        key: the image's key.

    Returns:
        The pairs, float64, foreground point first; and the number of pairs left out because no direction fits.
    """
    height, width = size
    rng = seeded(seed, f"pair {distance:g}", key)
    pairs, left_out = [], 0
    for x, y in grid_points(side, size):
        # Each pair draws as many numbers, so that no pair depends on others.
        angles_L = rng.uniform(0, 2 * math.pi, DIRECTIONS)
        ends_L2 = np.stack([x + distance * np.cos(angles_L), y + distance * np.sin(angles_L)], axis=-1)
        inside_L = ((ends_L2 >= 0) & (ends_L2 <= (width - 1, height - 1))).all(axis=1)
        if inside_L.any():
            pairs.append([(x, y), ends_L2[int(inside_L.argmax())]])
        else:
            left_out += 1
    points_PN2 = np.array(pairs, dtype=np.float64).reshape(-1, 2, 2)
    labels_PN = np.tile(np.array([1, 0], dtype=np.int64), (len(pairs), 1))
    return Prompts(points_PN2=torch.from_numpy(points_PN2), labels_PN=torch.from_numpy(labels_PN)), left_out


def choose_objects(count: int, most: int, seed: int, key: str) -> list[int]:
    """Choose the objects of an image to evaluate: all of them, or `most` drawn at random.

    Args:
        count: number of the image's objects.
        most: largest number of objects to choose.
        seed: seed of the evaluation.
        key: the image's key.

    Returns:
        Indices of objects, ascending.
    """
    if count <= most:
        return list(range(count))
    return sorted(seeded(seed, "objects", key).choice(count, most, replace=False).tolist())


def seeded(seed: int, purpose: str, key: str) -> np.random.Generator:
    """Return a random generator that depends only on the arguments, and is the same on every machine.

    Args:
        seed: seed of the evaluation.
        purpose: name of what is drawn, so that different draws are independent.
        key: the image's key.
    """
    text = f"{seed}\0{purpose}\0".encode() + key.encode("utf-8", "surrogateescape")
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(text).digest()[:16], "big")))


def centre_of_mask(mask_HW: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Return the pixel of a mask that is farthest from its boundary: the centre that a user would click on.

    The distance is the exact Euclidean one to the nearest pixel outside the mask; everything beyond the image's edge
    is outside. Of several such pixels, the first one, row by row, is returned. EdgeSAM's evaluation
    (`get_centroid_from_mask`) uses the same point with approximate distances.

    Args:
        mask_HW: bool (H, W), with at least one pixel.

    Returns:
        x and y in pixels.
    """
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    cropped = mask_HW[top : rows[-1] + 1, left : columns[-1] + 1]
    y, x = _innermost(np.pad(cropped, 1))
    return left + x - 1, top + y - 1


def _innermost(mask_HW: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Return y and x of the pixel that `centre_of_mask` returns, in a mask with a border of zeros.

    The steps to the nearest zero in eight directions give an upper bound of a pixel's distance. Distances are
    computed in order of decreasing bounds, until no bound is above the largest distance found: that needs few.
    """
    down_3HW = _steps_from_above(mask_HW)
    up_3HW = _steps_from_above(mask_HW[::-1])[:, ::-1]
    across_HW = np.minimum(_steps_from_above(mask_HW.T)[0].T, _steps_from_above(mask_HW.T[::-1])[0, ::-1].T)
    vertical_HW = np.minimum(down_3HW[0], up_3HW[0])
    straight_HW = np.minimum(vertical_HW, across_HW)
    diagonal_HW = np.minimum(down_3HW[1:].min(axis=0), up_3HW[1:].min(axis=0))
    bounds_L = np.minimum(straight_HW**2, 2 * diagonal_HW**2).ravel()
    order_L = np.argsort(-bounds_L, kind="stable")
    best, place = -1, 0
    for start in range(0, len(order_L), PIXELS_AT_ONCE):
        places_L = order_L[start : start + PIXELS_AT_ONCE]
        if bounds_L[places_L[0]] < best:
            break
        squares_L = _squared_distances(vertical_HW, places_L, int(bounds_L[places_L[0]]))
        greatest = int(squares_L.max())
        first = int(places_L[squares_L == greatest].min())
        if greatest > best or (greatest == best and first < place):
            best, place = greatest, first
    return divmod(place, mask_HW.shape[1])


def _steps_from_above(mask_HW: npt.NDArray[np.bool_]) -> Ints:
    """Return the steps to the nearest zero straight up, up to the left and up to the right: int64 (3, H, W)."""
    steps_3HW = np.zeros((3, *mask_HW.shape), dtype=np.int64)
    for y in range(1, len(mask_HW)):
        before_3W = steps_3HW[:, y - 1]
        steps_3HW[0, y] = before_3W[0] + 1
        steps_3HW[1, y, 1:] = before_3W[1, :-1] + 1
        steps_3HW[2, y, :-1] = before_3W[2, 1:] + 1
        steps_3HW[:, y] *= mask_HW[y]
    return steps_3HW


def _squared_distances(vertical_HW: Ints, places_L: Ints, bound: int) -> Ints:
    """Return the squared distances of pixels, given by their indices in the flattened mask, to the nearest zero.

    Each is the minimum, over the columns in reach, of the squared distance to the column plus the squared vertical
    distance in that column. No distance may be above `bound`, in squared pixels.
    """
    width = vertical_HW.shape[1]
    reach = int(np.sqrt(bound)) + 1
    y_L1, x_L1 = places_L[:, None] // width, places_L[:, None] % width
    columns_LX = np.clip(x_L1 + np.arange(-reach, reach + 1), 0, width - 1)
    return ((columns_LX - x_L1) ** 2 + vertical_HW[y_L1, columns_LX] ** 2).min(axis=1)
