"""Flatness of a noisy curve: pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_POINTS = 5


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Verdict on a curve, and the numbers behind it, in units of y."""

    first: float
    """Median of the first fifth of the points."""
    last: float
    """Median of the last fifth."""
    noise: float
    """Standard deviation of one point."""
    allowed: float
    """Largest rise from `first` to `last` that counts as flat."""
    late_slope: float
    """Slope, per unit of x, of the least-squares line through the second half."""
    late_slope_error: float
    """Standard error of that slope."""
    flat: bool


def judge(x: Sequence[float], y: Sequence[float], floor: float, steepest: float = math.inf) -> Judgement:
    """Judge if `y` ends no higher than it began, and no longer rises.

    Args:
        x: positions of the points.
        y: values of the points.
        floor: rise that is always allowed; four times the noise of a point is allowed, too.
        steepest: largest slope allowed in the second half, after subtracting two standard errors.

    Raises:
        ValueError: fewer than FEWEST_POINTS points.
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
    """Return the standard deviation of one point, estimated from differences of neighbours.

    It is computed from their median absolute deviation, which slow growth hardly changes.
    """
    steps = np.diff(np.asarray(y, dtype=np.float64))
    deviation = float(np.median(np.abs(steps - np.median(steps))))
    return 1.4826 * deviation / math.sqrt(2)


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return the slope of the least-squares line through three or more points, and the slope's standard error."""
    across = np.asarray(x, dtype=np.float64) - np.mean(x)
    up = np.asarray(y, dtype=np.float64) - np.mean(y)
    spread = float(across @ across)
    slope = float(across @ up) / spread
    left = up - slope * across
    return slope, math.sqrt(float(left @ left) / (len(left) - 2) / spread)
