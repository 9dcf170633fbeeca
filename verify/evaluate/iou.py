"""IoU of predicted masks with reference masks: scores of one prompt, totals of one model by protocol.

Shape suffixes: P prompts, T masks of one prompt, H and W rows and columns of a mask.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from ...distill.metrics.masks import intersection_and_union, iou
from .predictor import Floats, PredictedMasks

POINT = "point"
"""Protocol against the teacher: one foreground point; `pair_name` names those of pairs."""

BOX, CENTRE, TOP_SCORED, ORACLE = "box", "center", "center_picked", "center_oracle"
"""Protocols against labels: the single mask for an object's box; for its centre; of three masks for its centre the
one that the model rates highest; of these three the one with the highest IoU."""

LABEL_PROTOCOLS = (BOX, CENTRE, TOP_SCORED, ORACLE)


def pair_name(distance: int) -> str:
    """Return the name of the protocol of pairs of points `distance` pixels apart."""
    return f"pair_{distance}"


class IouTotals:
    """IoUs of one model: protocol -> those of each image, in the order in which the images were added."""

    def __init__(self) -> None:
        self._ious: dict[str, list[Floats]] = {}

    def add(self, protocol: str, ious_P: list[float]) -> None:
        """Add the IoUs of one image's prompts; an image without prompts of the protocol isn't counted."""
        if ious_P:
            self._ious.setdefault(protocol, []).append(np.array(ious_P, dtype=np.float64))

    def by_image(self, protocol: str) -> dict[str, Any] | None:
        """Return `miou`, the mean over an image's prompts, then over images; `prompts`; `images`. None without any.

        `miou` is None where one IoU is NaN.
        """
        ious = self._ious.get(protocol)
        return None if ious is None else _summary(ious, float(np.mean([ious_P.mean() for ious_P in ious])))

    def by_object(self, protocol: str) -> dict[str, Any] | None:
        """Return the same with the mean over the objects of all images, as in EdgeSAM's evaluation."""
        ious = self._ious.get(protocol)
        return None if ious is None else _summary(ious, float(np.concatenate(ious).mean()))


def _summary(ious: list[Floats], mean: float) -> dict[str, Any]:
    return {
        "miou": None if math.isnan(mean) else mean,
        "prompts": sum(map(len, ious)),
        "images": len(ious),
    }


def single_iou(predicted: PredictedMasks, wanted_HW: Tensor) -> float:
    """Return the IoU of a prompt's only mask."""
    return _ious(predicted, wanted_HW)[0]


def top_scored_iou(predicted: PredictedMasks, wanted_HW: Tensor) -> float:
    """Return the IoU of the mask that the model rates highest: the first of equals; a NaN is lowest."""
    scores_T = np.nan_to_num(np.asarray(predicted.scores_T, dtype=np.float64), nan=-np.inf)
    return _ious(predicted, wanted_HW)[int(np.argmax(scores_T))]


def oracle_iou(predicted: PredictedMasks, wanted_HW: Tensor) -> float:
    """Return the highest IoU of a prompt's masks."""
    return max(_ious(predicted, wanted_HW))


def _ious(predicted: PredictedMasks, wanted_HW: Tensor) -> list[float]:
    masks_THW = predicted.masks_THW
    wanted_THW = wanted_HW.to(masks_THW.device).expand_as(masks_THW)
    return iou(*intersection_and_union(masks_THW, wanted_THW)).tolist()
