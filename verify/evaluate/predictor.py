"""Interface of a model in an evaluation: it is given an image, then predicts masks for prompts; its cost.

Shape suffixes: T masks of one prompt, H and W rows and columns of a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...sam.modeling.decode_prompts import Prompts
from .images import LazyImage

TIMING_SECONDS = 20.0
"""Longest timing of a model, unless two calls take longer: one of ViT-H takes a minute on a small CPU."""

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, eq=False)
class PredictedMasks:
    """Masks of one prompt."""

    masks_THW: Tensor
    """bool, at the image's original size: one mask, or with multimask output three (of a plugin any number)."""
    scores_T: Floats
    """Quality of each mask as the model rates it: the IoU that it predicts."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Size and speed of a model; None where a number isn't known."""

    parameters: int | None = None
    """Of encoder and decoder together."""
    encoder_parameters: int | None = None
    encoder_macs: int | None = None
    """Multiply-accumulates of convolutions, matrix products and attention for one image."""
    encoder_ms: float | None = None
    """Milliseconds for one image, median; for a model without an encoder, of all that it computes of an image
    alone."""
    decoder_ms: float | None = None
    """Milliseconds for one prompt of one point, median."""


class Predictor(Protocol):
    """A model in an evaluation."""

    name: str
    multimask: bool
    """True if the model can predict several masks for one prompt."""

    def set_image(self, image: LazyImage) -> bool:
        """Take an image; return False where its embedding isn't finite, so that its masks mean nothing."""

    def predict(self, prompts: Prompts, multimask_output: bool) -> list[PredictedMasks]:
        """Return the masks of each prompt.

        Args:
            prompts: about the image that was set; coordinates in pixels of the original image, on the CPU.
            multimask_output: several masks a prompt instead of one.
        """

    def cost(self) -> Cost:
        """Measure the cost. The image that was set is lost."""
