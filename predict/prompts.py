"""Prompts of a user: points and boxes in pixels of the displayed image, or everything in it.

Shape suffixes: N points of one prompt, 2 (x, y), 4 (x0, y0, x1, y1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..common.config import require
from ..common.errors import PredictError, counted

Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class ImagePrompts:
    """All prompts for one image, checked on construction.

    Coordinates are pixels of the original image after its EXIF orientation is applied; x to the right, y down, (0, 0)
    the top-left pixel. All points together, with a single box if given, mean one object. Several boxes mean one
    object each.

    Raises:
        PredictError: prompts contradict each other, a number isn't finite, or a box is empty.
    """

    points: Sequence[Point] = ()
    """(x, y) of each point on the object."""
    negative_points: Sequence[Point] = ()
    """(x, y) of each point that is not on the object."""
    boxes: Sequence[Box] = ()
    """(x0, y0, x1, y1) of each box."""
    everything: bool = False
    """Segment everything in the image; takes no points or boxes."""

    def __post_init__(self) -> None:
        for name, length in (("points", 2), ("negative_points", 2), ("boxes", 4)):
            values = tuple(tuple(float(number) for number in value) for value in getattr(self, name))
            object.__setattr__(self, name, values)
            for value in values:
                require(
                    len(value) == length,
                    f"{_joined(value)} has {len(value)} numbers, not {length}",
                    PredictError,
                )
                require(
                    all(map(math.isfinite, value)),
                    f"{_joined(value)} holds a number that isn't finite",
                    PredictError,
                )
        self._check_combination()
        for x0, y0, x1, y1 in self.boxes:
            require(
                x0 < x1 and y0 < y1,
                f"--box {_joined((x0, y0, x1, y1))} is empty: give X0 Y0 X1 Y1 with X0 < X1 and Y0 < Y1, the corners "
                "at the top left and at the bottom right",
                PredictError,
            )

    def _check_combination(self) -> None:
        points, negative, boxes = len(self.points), len(self.negative_points), len(self.boxes)
        if self.everything:
            require(
                not points + negative + boxes,
                f"--everything takes no prompts, and there are {counted(points + negative, 'point')} "
                f"and {counted(boxes, 'box', 'boxes')}: "
                "leave out one or the other",
                PredictError,
            )
            return
        require(
            bool(points + negative + boxes),
            "nothing to segment: give --point X Y, --box X0 Y0 X1 Y1 or --everything",
            PredictError,
        )
        require(
            bool(points or boxes),
            f"{negative} negative points alone select no object: give a --point or --box with them",
            PredictError,
        )
        require(
            boxes < 2 or not points + negative,
            f"{counted(points + negative, 'point')} with {counted(boxes, 'box', 'boxes')}: points "
            "belong to one object, so give one box with them, "
            "or boxes alone",
            PredictError,
        )

    def inside(self, original_size: tuple[int, int]) -> tuple[ImagePrompts, list[str]]:
        """Clip boxes to the image, and refuse prompts outside it.

        A point must lie on a pixel, 0 <= x < width. A box may touch the image's edge, 0 <= x0 < x1 <= width.

        Args:
            original_size: height and width of the image in pixels.

        Returns:
            The prompts, boxes that reach over the edge clipped; a note for each of these.

        Raises:
            PredictError: a point is outside, or a whole box; the message names the first one and the image's size.
        """
        height, width = original_size
        outside = f"outside the image, which is {width} x {height} pixels"
        for option, points in (("--point", self.points), ("--negative-point", self.negative_points)):
            for x, y in points:
                require(
                    0 <= x < width and 0 <= y < height,
                    f"{option} {_joined((x, y))} is {outside}",
                    PredictError,
                )
        boxes, notes = [], []
        for box in self.boxes:
            x0, y0, x1, y1 = box
            clipped = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
            overlaps = clipped[0] < clipped[2] and clipped[1] < clipped[3]
            require(overlaps, f"--box {_joined(box)} is {outside}", PredictError)
            boxes.append(clipped)
            if clipped != box:
                notes.append(
                    f"--box {_joined(box)} reaches over the edge of the image, which is {width} x {height} pixels; "
                    f"clipped to {_joined(clipped)}"
                )
        return replace(self, boxes=boxes), notes

    def objects(self) -> list[ObjectPrompt]:
        """Return one prompt for each object, in the order of the boxes; an empty list for everything."""
        coords = [*self.points, *self.negative_points]
        if not coords:
            return [
                ObjectPrompt(coords_N2=None, labels_N=None, box_4=np.array(box), ambiguous=False)
                for box in self.boxes
            ]
        return [
            ObjectPrompt(
                coords_N2=np.array(coords),
                labels_N=np.array([1] * len(self.points) + [0] * len(self.negative_points)),
                box_4=np.array(self.boxes[0]) if self.boxes else None,
                ambiguous=len(coords) == 1 and not self.boxes,
            )
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class ObjectPrompt:
    """Prompt for one object, as arrays for `SamPredictor.predict`."""

    coords_N2: npt.NDArray[np.float64] | None
    """x and y of each point in pixels; None without points."""
    labels_N: npt.NDArray[np.int64] | None
    """1 for a foreground point, 0 for a background point; None without points."""
    box_4: npt.NDArray[np.float64] | None
    """x0, y0, x1, y1 in pixels; None without a box."""
    ambiguous: bool
    """True for a single point, which may mean an object, a part or a subpart: SAM predicts three masks."""


def _joined(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:.10g}" for number in numbers)
