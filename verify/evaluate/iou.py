"""How a model's masks overlap those that they are compared with, added up over images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from ...distill.metrics.masks import iou, overlap
from .predictor import Answer, Floats, best_by

POINT = "point"
"""A foreground point against the teacher; "pair_100" and so on are the pairs."""

BOX, CENTRE, PICKED, ORACLE = "box", "center", "center_picked", "center_oracle"
"""Against labels: the single mask for an object's box and for its centre; of three for its centre the one that the
model rates best, and the best one."""

LABEL_PROTOCOLS = (BOX, CENTRE, PICKED, ORACLE)


def pair_name(distance: int) -> str:
    """The protocol of pairs so many pixels apart."""
    return f"pair_{distance}"


class Tally:
    """One model's IoUs: protocol -> each image's, in the order in which the images were added."""

    def __init__(self) -> None:
        self._ious: dict[str, list[Floats]] = {}

    def add(self, protocol: str, ious_N: list[float]) -> None:
        """One image's prompts; none where the image has none of the kind."""
        if ious_N:
            self._ious.setdefault(protocol, []).append(np.array(ious_N, dtype=np.float64))

    def by_image(self, protocol: str) -> dict[str, Any] | None:
        """Mean over an image's prompts, then over images: `miou`, `prompts`, `images`. None without any.

        `miou` is None where one of them isn't defined.
        """
        ious = self._ious.get(protocol)
        return None if ious is None else _summary(ious, float(np.mean([ious_N.mean() for ious_N in ious])))

    def by_object(self, protocol: str) -> dict[str, Any] | None:
        """Mean over the objects of all images, as EdgeSAM's evaluation has it."""
        ious = self._ious.get(protocol)
        return None if ious is None else _summary(ious, float(np.concatenate(ious).mean()))


def _summary(ious: list[Floats], mean: float) -> dict[str, Any]:
    return {
        "miou": None if math.isnan(mean) else mean,
        "prompts": sum(map(len, ious)),
        "images": len(ious),
    }


def first_iou(answer: Answer, wanted_HW: Tensor) -> float:
    """Of the only mask."""
    return ious_with(answer, wanted_HW)[0]


def picked_iou(answer: Answer, wanted_HW: Tensor) -> float:
    """Of the mask that the model rates best."""
    return ious_with(answer, wanted_HW)[best_by(answer.scores_C)]


def best_iou(answer: Answer, wanted_HW: Tensor) -> float:
    """Of the mask that is best."""
    return max(ious_with(answer, wanted_HW))


def ious_with(answer: Answer, wanted_HW: Tensor) -> list[float]:
    """Of each mask of an answer; the wanted one comes to its device."""
    wanted_CHW = wanted_HW.to(answer.masks_CHW.device).expand_as(answer.masks_CHW)
    return iou(*overlap(answer.masks_CHW, wanted_CHW)).tolist()
