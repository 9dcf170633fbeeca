"""Whether student and teacher mean the same masks: both embeddings through SAM's head, for the same points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...sam.modeling.head import SamHead
from ...sam.modeling.masks import mask_chunks
from ...store import ImageRecord

Floats = npt.NDArray[np.floating]

POINTS = 4
"""An image's points are this many in each direction, unless something else is asked for."""


def grid_points(side: int, size: tuple[int, int]) -> Floats:
    """The centres of side x side equal parts of an image of `size` (height, width), row by row: x and y in pixels,
    float64 (side * side, 2)."""
    centres = (np.arange(side) + 0.5) / side
    y, x = np.meshgrid(centres * size[0], centres * size[1], indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=-1)


def overlap(one_NHW: Tensor, other_NHW: Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pixels in both masks and pixels in either, for each of N pairs of bool masks (N, H, W)."""
    # One by one: over dimensions, count_nonzero takes twenty times as long on a CPU.
    shared = [int(torch.count_nonzero(one & other)) for one, other in zip(one_NHW, other_NHW, strict=True)]
    either = [int(torch.count_nonzero(one | other)) for one, other in zip(one_NHW, other_NHW, strict=True)]
    return np.array(shared, dtype=np.int64), np.array(either, dtype=np.int64)


def iou(shared_N: npt.NDArray[np.int64], either_N: npt.NDArray[np.int64]) -> Floats:
    """Intersection over union, float64 (N,); 1 for two empty masks."""
    return np.where(either_N > 0, shared_N / np.maximum(either_N, 1), 1.0)


class MaskComparison:
    """Adds up, image by image, how far the student's masks are the teacher's.

    The prompts of an image are the points of `grid_points(side, ...)`, each by itself, as foreground. The student's
    embedding goes through `student_head`, where one was trained for it, else through the teacher's.
    """

    def __init__(
        self,
        head: SamHead,
        records: Mapping[int, ImageRecord],
        side: int,
        student_head: SamHead | None = None,
    ) -> None:
        self.head = head
        self.student_head = head if student_head is None else student_head
        self.side = side
        self.ious: list[Floats] = []
        """Each image's IoU for each of its points, in the order in which the images were added."""
        self._records = records
        self.empty = {"teacher": 0, "student": 0}

    def add(self, rows: Sequence[int], student_BCHW: Tensor, teacher_BCHW: Tensor) -> None:
        """Compares a batch, float32 (B, 256, g, g) on the head's device, `rows` saying whose embeddings it holds."""
        for i, row in enumerate(rows):
            self.ious.append(self._compare(row, student_BCHW[i : i + 1], teacher_BCHW[i : i + 1]))

    def _compare(self, row: int, student_1CHW: Tensor, teacher_1CHW: Tensor) -> Floats:
        record = self._records[row]
        assert record.original_size is not None, "only committed rows are compared"
        assert record.resized_size is not None, "only committed rows are compared"
        points_N2 = grid_points(self.side, record.original_size)
        if not (bool(torch.isfinite(student_1CHW).all()) and bool(torch.isfinite(teacher_1CHW).all())):
            # Their masks would be empty, and empty masks agree.
            return np.full(len(points_N2), math.nan)
        ious = []
        for teacher_nHW, student_nHW in self.masks(
            teacher_1CHW, student_1CHW, points_N2, record.original_size, record.resized_size
        ):
            ious.append(iou(*overlap(teacher_nHW, student_nHW)))
            for name, masks_nHW in (("teacher", teacher_nHW), ("student", student_nHW)):
                self.empty[name] += sum(not bool(mask_HW.any()) for mask_HW in masks_nHW)
        return np.concatenate(ious)

    def masks(
        self,
        teacher_1CHW: Tensor,
        student_1CHW: Tensor,
        points_N2: Floats,
        original_size: tuple[int, int],
        resized_size: tuple[int, int],
    ) -> Iterator[list[Tensor]]:
        """The teacher's masks and the student's for some points at a time, bool (n, H, W) each; see `mask_chunks`."""
        pairs = [(self.head, teacher_1CHW), (self.student_head, student_1CHW)]
        return mask_chunks(pairs, points_N2, original_size, resized_size)

    def take(self, ious: Sequence[Floats], empty: Mapping[str, int]) -> None:
        """Adds what another comparison of the same kind has found."""
        self.ious.extend(ious)
        for name, count in empty.items():
            self.empty[name] += count

    @property
    def per_image(self) -> list[float]:
        """Each image's mean over its points; NaN where an embedding isn't finite."""
        return [float(ious_N.mean()) for ious_N in self.ious]

    def result(self) -> dict[str, Any]:
        """`miou`, `miou_min`, `prompts`, `empty_masks`, as verify's result has them."""
        per_image = np.array(self.per_image)
        return {
            "miou": _defined(per_image.mean()),
            "miou_min": _defined(per_image.min()),
            "prompts": self.side**2,
            "empty_masks": dict(self.empty),
        }


def _defined(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)
