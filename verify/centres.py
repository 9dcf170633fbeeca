"""The point of a mask that is farthest from its boundary: the centre that a user would click on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
