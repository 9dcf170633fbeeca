"""What takes part in an evaluation: anything that looks at an image and answers prompts with masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .images import Scene
from .prompts import Prompts

LIMIT = 20.0
"""Seconds that a model is timed for, if two calls don't take longer: ViT-H takes a minute a call on a small CPU."""

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """The masks for one prompt."""

    masks_CHW: Tensor
    """bool (C, H, W) at the image's original size: one, or with several wanted three (of another's predictor any)."""
    scores_C: Floats
    """What the model thinks of each; the IoU that it predicts."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model takes; None where it isn't known."""

    parameters: int | None = None
    """Of encoder and decoder together."""
    encoder_parameters: int | None = None
    encoder_macs: int | None = None
    """Multiply-accumulates of convolutions, matrix products and attention for one image."""
    encoder_ms: float | None = None
    """One image, median; where a model has no encoder of its own, all that it does with an image."""
    decoder_ms: float | None = None
    """One prompt of one point, median."""


class Contender(Protocol):
    """A model in an evaluation."""

    name: str
    several: bool
    """Whether it can be asked for several masks a prompt."""

    def look(self, scene: Scene) -> bool:
        """Takes an image; False where nothing can be said of it, as its embedding isn't finite."""

    def answer(self, prompts: Prompts, several: bool) -> list[Answer]:
        """Masks of that image for each prompt."""

    def cost(self) -> Cost:
        """Measures it."""


def best_by(scores: Sequence[float] | Floats) -> int:
    """The place of the highest score, of several the first; those that are no numbers lose."""
    return int(np.argmax(np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=-np.inf)))
