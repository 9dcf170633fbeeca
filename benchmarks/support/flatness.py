"""Is a curve flat? Arithmetic alone: numbers in, a judgement out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_POINTS = 5


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """`first` and `last` are medians of the first and the last fifth of a curve's points; `late_slope`, per unit of
    x, and its standard error are of the line of least squares through the second half. `allowed` is what `last`
    may be above `first`, `noise` the standard deviation of one point."""

    first: float
    last: float
    noise: float
    allowed: float
    late_slope: float
    late_slope_error: float
    flat: bool


def judge(x: Sequence[float], y: Sequence[float], floor: float, steepest: float = math.inf) -> Judgement:
    """Whether `y` ends no higher than it began, and no longer rises.

    It may end above its beginning by four times the noise of a point, but no less than `floor`; and the slope of its
    second half, less two standard errors, must not be above `steepest`. ValueError for too few points.
    """
    if len(x) < FEWEST_POINTS:
        raise ValueError(f"{len(x)} points make no curve: {FEWEST_POINTS} are needed")
    fifth, half = len(y) // 5, max(3, len(y) // 2)
    first, last = float(np.median(y[:fifth])), float(np.median(y[-fifth:]))
    noise = neighbour_noise(y)
    allowed = max(floor, 4 * noise)
    slope, error = line(x[-half:], y[-half:])
    return Judgement(
        first=first,
        last=last,
        noise=noise,
        allowed=allowed,
        late_slope=slope,
        late_slope_error=error,
        flat=last - first <= allowed and slope - 2 * error <= steepest,
    )


def neighbour_noise(y: Sequence[float]) -> float:
    """Standard deviation of one point, from the median absolute deviation of the differences of neighbours: a slow
    growth hardly touches it."""
    steps = np.diff(np.asarray(y, dtype=np.float64))
    deviation = float(np.median(np.abs(steps - np.median(steps))))
    return 1.4826 * deviation / math.sqrt(2)


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of the line of least squares through three points or more, and the slope's standard error."""
    across = np.asarray(x, dtype=np.float64) - np.mean(x)
    up = np.asarray(y, dtype=np.float64) - np.mean(y)
    spread = float(across @ across)
    slope = float(across @ up) / spread
    left = up - slope * across
    return slope, math.sqrt(float(left @ left) / (len(left) - 2) / spread)
