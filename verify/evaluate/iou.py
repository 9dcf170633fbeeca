"""IoU of predicted masks with reference masks: scores for one prompt, totals for one model by protocol.

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
"""Protocol against the teacher: one foreground point; `pair_name` gives the names of protocols with pairs."""

BOX, CENTRE, TOP_SCORED, ORACLE = "box", "center", "center_picked", "center_oracle"
"""Protocols against labels: the single mask for an object's box; the single mask for its centre; of the three masks
for its centre, the one with the highest predicted IoU; of these three, the one with the highest true IoU."""

LABEL_PROTOCOLS = (BOX, CENTRE, TOP_SCORED, ORACLE)


def pair_name(distance: int) -> str:
    """Return the name of the protocol with pairs of points that are `distance` pixels apart."""
    return f"pair_{distance}"


class IouTotals:
    """IoUs of one model by protocol and image."""

    def __init__(self) -> None:
        self._ious: dict[str, list[Floats]] = {}

    def add(self, protocol: str, ious_P: list[float]) -> None:
        """Add one image.

        Args:
            protocol: name of the protocol.
            ious_P: IoU of each prompt of the image; if there are none, the image isn't counted.
        """
        if ious_P:
            self._ious.setdefault(protocol, []).append(np.array(ious_P, dtype=np.float64))

    def by_image(self, protocol: str) -> dict[str, Any] | None:
        """Average over each image's prompts, then over images.

        Returns:
            `miou`, None if any IoU is NaN; `prompts` and `images`, their numbers. None for a protocol without images.
        """
        ious = self._ious.get(protocol)
        return None if ious is None else _summary(ious, float(np.mean([ious_P.mean() for ious_P in ious])))

    def by_object(self, protocol: str) -> dict[str, Any] | None:
        """Average over the objects of all images, as in EdgeSAM's evaluation; result as of `by_image`."""
        ious = self._ious.get(protocol)
        return None if ious is None else _summary(ious, float(np.concatenate(ious).mean()))


def _summary(ious: list[Floats], mean: float) -> dict[str, Any]:
    return {
        "miou": None if math.isnan(mean) else mean,
        "prompts": sum(map(len, ious)),
        "images": len(ious),
    }


def single_iou(predicted: PredictedMasks, wanted_HW: Tensor) -> float:
    """Return the IoU of a prompt's first mask, its only one without multimask output.

    Args:
        predicted: masks of one prompt.
        wanted_HW: reference mask, bool (H, W), on any device.
    """
    return _ious(predicted, wanted_HW)[0]


def top_scored_iou(predicted: PredictedMasks, wanted_HW: Tensor) -> float:
    """Return the IoU of the mask with the highest score: the first of equal ones; NaN is the lowest score.

    Args:
        predicted: masks of one prompt.
        wanted_HW: reference mask, bool (H, W), on any device.
    """
    scores_T = np.nan_to_num(np.asarray(predicted.scores_T, dtype=np.float64), nan=-np.inf)
    return _ious(predicted, wanted_HW)[int(np.argmax(scores_T))]


def oracle_iou(predicted: PredictedMasks, wanted_HW: Tensor) -> float:
    """Return the highest IoU of a prompt's masks.

    Args:
        predicted: masks of one prompt.
        wanted_HW: reference mask, bool (H, W), on any device.
    """
    return max(_ious(predicted, wanted_HW))


def _ious(predicted: PredictedMasks, wanted_HW: Tensor) -> list[float]:
    masks_THW = predicted.masks_THW
    wanted_THW = wanted_HW.to(masks_THW.device).expand_as(masks_THW)
    return iou(*intersection_and_union(masks_THW, wanted_THW)).tolist()
