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

from ..distill.mask_comparison import grid_points

Floats = npt.NDArray[np.floating]

DISTANCES = (100, 200, 300, 400, 500)
"""Pixels between the two points of a pair: those of the MobileSAM paper's comparison with FastSAM (its Table 6)."""

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
