"""Mask metric (mIoU): the student's masks against the teacher's, both decoded by SAM's head, for a grid of points.

Source: MobileSAM's protocol (arXiv 2306.14289), which compares both models' masks for the same prompts. One mask per
prompt, threshold 0, original resolution; the IoU of two empty masks is 1.

Shape suffixes: B images, C channels, H and W rows and columns of the embedding's grid or of a mask at the image's
original size, P prompts (one point each), p some of them, 1 one, 2 (x, y).
"""

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

POINTS_PER_SIDE = 4
"""Default number of grid points in each direction."""


def grid_points(points_per_side: int, size: tuple[int, int]) -> Floats:
    """Return the centres of points_per_side x points_per_side equal parts of an image, row by row.

    Args:
        points_per_side: number of points in each direction.
        size: height and width of the image in pixels.

    Returns:
        float64 (points_per_side^2, 2), x and y in pixels of the image.
    """
    centres = (np.arange(points_per_side) + 0.5) / points_per_side
    y, x = np.meshgrid(centres * size[0], centres * size[1], indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=-1)


def intersection_and_union(
    one_PHW: Tensor, other_PHW: Tensor
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count the pixels in the intersection and in the union of each of P pairs of masks.

    Args:
        one_PHW: bool (P, H, W).
        other_PHW: bool (P, H, W), on the same device.

    Returns:
        Intersections and unions in pixels, int64 (P,) each.
    """
    intersection_P, one_P, other_P = pixel_counts(one_PHW, other_PHW)
    return intersection_P, one_P + other_P - intersection_P


def pixel_counts(one_PHW: Tensor, other_PHW: Tensor) -> npt.NDArray[np.int64]:
    """Count the pixels of P pairs of masks, waiting once for a GPU.

    Args:
        one_PHW: bool (P, H, W).
        other_PHW: bool (P, H, W), on the same device.

    Returns:
        Pixels in both masks, in the first, and in the second: int64 (3, P).
    """
    # Pair by pair: count_nonzero with dimensions takes twenty times as long on a CPU.
    counts = [
        torch.count_nonzero(mask_HW)
        for one_HW, other_HW in zip(one_PHW, other_PHW, strict=True)
        for mask_HW in (one_HW & other_HW, one_HW, other_HW)
    ]
    if not counts:
        return np.zeros((3, 0), dtype=np.int64)
    return torch.stack(counts).view(-1, 3).T.cpu().numpy()


def iou(intersection_P: npt.NDArray[np.int64], union_P: npt.NDArray[np.int64]) -> Floats:
    """Return the intersection over union of P pairs of masks.

    Args:
        intersection_P: int64 (P,), pixels in both masks.
        union_P: int64 (P,), pixels in either mask.

    Returns:
        float64 (P,), 0 to 1; 1 for two empty masks.
    """
    return np.where(union_P > 0, intersection_P / np.maximum(union_P, 1), 1.0)


class MaskComparison:
    """Accumulator of the IoU between the student's masks and the teacher's, image by image.

    Each point of `grid_points` is one prompt, a foreground point.

    Args:
        head: the teacher's head; it also decodes the student's masks, unless `student_head` is given.
        records: records by row, for all rows that will be compared.
        points_per_side: number of points in each direction.
        student_head: head that was trained for the student.
        constant_CHW: float32 (256, g, g) on the head's device, an embedding that knows nothing of the image, whose
            masks are compared with the teacher's as well; None: no such comparison.

    Attributes:
        ious: float64 (P,) for each image, in the order in which the images were added; NaN if an embedding isn't
            finite.
        constant_ious: the same of the constant; empty without one.
        empty: number of empty masks, by "teacher" and "student".
    """

    def __init__(
        self,
        head: SamHead,
        records: Mapping[int, ImageRecord],
        points_per_side: int,
        student_head: SamHead | None = None,
        constant_CHW: Tensor | None = None,
    ) -> None:
        self.head = head
        self.student_head = head if student_head is None else student_head
        self.points_per_side = points_per_side
        self.constant_CHW = constant_CHW
        self.ious: list[Floats] = []
        self.constant_ious: list[Floats] = []
        self.empty = {"teacher": 0, "student": 0}
        self._records = records

    def update(self, rows: Sequence[int], student_BCHW: Tensor, teacher_BCHW: Tensor) -> None:
        """Add a batch.

        Args:
            rows: row numbers of the B images in the store.
            student_BCHW: float32 (B, 256, g, g), on the head's device.
            teacher_BCHW: float32 (B, 256, g, g), on the head's device.
        """
        finite_B = (
            (torch.isfinite(student_BCHW) & torch.isfinite(teacher_BCHW)).flatten(1).all(dim=1).tolist()
        )
        for i, (row, finite) in enumerate(zip(rows, finite_B, strict=True)):
            self.ious.append(self._compare(row, student_BCHW[i : i + 1], teacher_BCHW[i : i + 1], finite))

    def _compare(self, row: int, student_1CHW: Tensor, teacher_1CHW: Tensor, finite: bool) -> Floats:
        record = self._records[row]
        assert record.original_size is not None, "only committed rows are compared"
        assert record.resized_size is not None, "only committed rows are compared"
        points_P2 = grid_points(self.points_per_side, record.original_size)
        if not finite:
            # Their masks would be empty, and empty masks agree.
            return np.full(len(points_P2), math.nan)
        ious, constant_ious = [], []
        for teacher_pHW, student_pHW, *constant in self.masks(
            teacher_1CHW, student_1CHW, points_P2, record.original_size, record.resized_size
        ):
            both_p, teacher_p, student_p = pixel_counts(teacher_pHW, student_pHW)
            ious.append(iou(both_p, teacher_p + student_p - both_p))
            constant_ious += [iou(*intersection_and_union(teacher_pHW, pHW)) for pHW in constant]
            for name, pixels_p in (("teacher", teacher_p), ("student", student_p)):
                self.empty[name] += int((pixels_p == 0).sum())
        if constant_ious:
            self.constant_ious.append(np.concatenate(constant_ious))
        return np.concatenate(ious)

    def masks(
        self,
        teacher_1CHW: Tensor,
        student_1CHW: Tensor,
        points_P2: Floats,
        original_size: tuple[int, int],
        resized_size: tuple[int, int],
    ) -> Iterator[list[Tensor]]:
        """Decode both models' masks for all points, a few points at a time.

        Args:
            teacher_1CHW: float32 (1, 256, g, g), on the head's device.
            student_1CHW: float32 (1, 256, g, g), on the head's device.
            points_P2: float (P, 2), x and y in pixels of the original image.
            original_size: height and width in pixels of the image, and of the masks.
            resized_size: height and width in pixels of the image in the encoder's square.

        Yields:
            The teacher's and the student's masks, and the constant's if there is one, bool (p, H, W) each.
        """
        pairs = [(self.head, teacher_1CHW), (self.student_head, student_1CHW)]
        if self.constant_CHW is not None:
            pairs.append((self.head, self.constant_CHW[None]))
        return mask_chunks(pairs, points_P2, original_size, resized_size)

    def merge(self, ious: Sequence[Floats], empty: Mapping[str, int]) -> None:
        """Add the images of another comparison with as many points.

        Args:
            ious: float64 (P,) per image, as the attribute `ious`.
            empty: number of empty masks, by "teacher" and "student".
        """
        self.ious.extend(ious)
        for name, count in empty.items():
            self.empty[name] += count

    @property
    def per_image(self) -> list[float]:
        """Mean IoU of each image over its points; NaN if an embedding isn't finite."""
        return [float(ious_P.mean()) for ious_P in self.ious]

    def result(self) -> dict[str, Any]:
        """Return the metrics over all images, as in verify's result.

        Returns:
            `miou` (mean over images) and `miou_min` (minimum), None if any image's mean is NaN; `prompts` (number per
            image); `empty_masks` (by "teacher" and "student"); with a constant `miou_constant`, its mean over images,
            None if there are none with finite embeddings.
        """
        per_image = np.array(self.per_image)
        constant: dict[str, Any] = {}
        if self.constant_CHW is not None:
            means = [float(ious_P.mean()) for ious_P in self.constant_ious]
            constant["miou_constant"] = math.fsum(means) / len(means) if means else None
        return {
            "miou": _none_if_nan(per_image.mean()),
            "miou_min": _none_if_nan(per_image.min()),
            "prompts": self.points_per_side**2,
            "empty_masks": dict(self.empty),
            **constant,
        }


def _none_if_nan(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)
