"""Interface of a model in an evaluation: prediction of masks for prompts in an image, and its cost.

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
"""Time limit in seconds for measuring a model's speed, unless two calls take longer: a call of ViT-H takes a minute
on a small CPU."""

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, eq=False)
class PredictedMasks:
    """Masks of one prompt."""

    masks_THW: Tensor
    """bool (T, H, W), at the image's original size: one mask; with multimask output three (a plugin: any number)."""
    scores_T: Floats
    """Score of each mask by the model: its predicted IoU."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Size and speed of a model; None where unknown."""

    parameters: int | None = None
    """Number of parameters of encoder and decoder together."""
    encoder_parameters: int | None = None
    """Number of parameters of the encoder."""
    encoder_macs: int | None = None
    """Multiply-accumulates of convolutions, matrix products and attention for one image."""
    encoder_ms: float | None = None
    """Milliseconds for one image, median; for a model without an encoder, of the whole computation before prompts."""
    decoder_ms: float | None = None
    """Milliseconds for one prompt of one point, median."""


class Predictor(Protocol):
    """Model in an evaluation."""

    name: str
    """Name of the model in the evaluation."""
    multimask: bool
    """True if the model can predict several masks for one prompt."""

    def set_image(self, image: LazyImage) -> bool:
        """Set the image of the next prompts; return False if its embedding isn't finite and masks are invalid."""

    def predict(self, prompts: Prompts, multimask_output: bool) -> list[PredictedMasks]:
        """Predict the masks of each prompt.

        Args:
            prompts: P prompts for the image that was set; coordinates in pixels of the original image, on the CPU.
            multimask_output: True for several masks per prompt, False for one.

        Returns:
            P results, in the order of the prompts.
        """

    def cost(self) -> Cost:
        """Measure the cost. Afterwards an image must be set again."""
