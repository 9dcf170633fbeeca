"""Whether student and teacher mean the same masks: both embeddings through the store's head, for the same points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..sam import CheckpointError
from ..sam.head import SamHead, build_head
from ..sam.masks import mask_chunks
from ..store import EmbeddingStore, ImageRecord
from .errors import VerifyError

Floats = npt.NDArray[np.floating]


def grid_points(side: int, size: tuple[int, int]) -> Floats:
    """The centres of side x side equal parts of an image of `size` (height, width), row by row: x and y in pixels,
    float64 (side * side, 2)."""
    centres = (np.arange(side) + 0.5) / side
    y, x = np.meshgrid(centres * size[0], centres * size[1], indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=-1)


def open_head(store: EmbeddingStore, device: torch.device) -> SamHead:
    """The store's prompt encoder and mask decoder on `device`.

    Raises StoreDamaged when the file is not what was stored, VerifyError when it isn't a SAM head.
    """
    try:
        state = {key: value.float() for key, value in load(store.read_head()).items()}
        head = build_head(state, store.spec.image_size)
    except (CheckpointError, SafetensorError) as error:
        raise VerifyError(
            f"{store.head_path} is not a SAM head ({str(error)[:100]}), so masks can't be compared: "
            "--points 0 goes on without them"
        ) from error
    broken = next((key for key, value in state.items() if not bool(torch.isfinite(value).all())), None)
    if broken is not None:
        raise VerifyError(
            f"{store.head_path} holds values that aren't finite, in {broken}, so masks can't be compared: "
            "--points 0 goes on without them"
        )
    return head.to(device)


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

    The prompts of an image are the points of `grid_points(side, ...)`, each by itself, as foreground.
    """

    def __init__(self, head: SamHead, records: Mapping[int, ImageRecord], side: int) -> None:
        self.head = head
        self.side = side
        self.ious: list[Floats] = []
        """Each image's IoU for each of its points, in the order in which the images were added."""
        self._records = records
        self._empty = {"teacher": 0, "student": 0}

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
        embeddings = [teacher_1CHW, student_1CHW]
        ious = []
        for teacher_nHW, student_nHW in mask_chunks(
            self.head, embeddings, points_N2, record.original_size, record.resized_size
        ):
            ious.append(iou(*overlap(teacher_nHW, student_nHW)))
            for name, masks_nHW in (("teacher", teacher_nHW), ("student", student_nHW)):
                self._empty[name] += sum(not bool(mask_HW.any()) for mask_HW in masks_nHW)
        return np.concatenate(ious)

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
            "empty_masks": dict(self._empty),
        }


def _defined(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)
