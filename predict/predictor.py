"""The masks that a SAM gives for an image and prompts, and how long that took."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import Sam

from .mask_files import Mask
from .prompts import ObjectPrompt, ImagePrompts

STABILITY_OFFSET = 1.0
"""As SamAutomaticMaskGenerator's default."""

POINTS_AT_ONCE = 64
"""SamAutomaticMaskGenerator's default."""

PIXELS_AT_ONCE = 2**26
"""Points at once times pixels of the image: 64 points on a photo of a megapixel. A point has three masks of logits,
so these take 800 MB; at 64 points whatever the photo, 12 megapixels would take 10 GB."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Masks in the order of the boxes, or by area, the largest first, for everything; and seconds."""

    masks: list[Mask]
    embedding_seconds: float
    """Resizing, normalising and the image encoder."""
    mask_seconds: float
    """Prompt encoder, mask decoder, and whatever makes masks of its logits."""


def predict(sam: Sam, image_HWC: npt.NDArray[np.uint8], prompts: ImagePrompts) -> Prediction:
    """Segments an image.

    Args:
        sam: as `Model.sam`.
        image_HWC: uint8 RGB (H, W, 3).
        prompts: inside the image.

    One point alone is ambiguous: of SAM's three masks the one with the highest predicted IoU is taken. For other
    prompts it is SAM's single mask. Everything is SamAutomaticMaskGenerator with its defaults.
    """
    predictor = _TimedPredictor(sam)
    start = time.perf_counter()
    if prompts.everything:
        masks = _everything(predictor, image_HWC)
    else:
        predictor.set_image(image_HWC)
        masks = [_one_object(predictor, prompt) for prompt in prompts.objects()]
    seconds = time.perf_counter() - start
    return Prediction(
        masks=masks,
        embedding_seconds=predictor.seconds,
        mask_seconds=seconds - predictor.seconds,
    )


class _TimedPredictor(SamPredictor):
    """Knows how long its images took to embed."""

    seconds = 0.0

    def set_image(self, image: npt.NDArray[np.uint8], image_format: str = "RGB") -> None:
        start = time.perf_counter()
        super().set_image(image, image_format)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - start


def _one_object(predictor: _TimedPredictor, prompt: ObjectPrompt) -> Mask:
    logits_CHW, iou_C, _ = predictor.predict(
        point_coords=prompt.coords_N2,
        point_labels=prompt.labels_N,
        box=prompt.box_4,
        multimask_output=prompt.ambiguous,
        return_logits=True,
    )
    best = int(np.argmax(iou_C))
    logits_HW = logits_CHW[best]
    points = [] if prompt.coords_N2 is None else prompt.coords_N2[prompt.labels_N == 1].tolist()
    return Mask.from_pixels(
        logits_HW > predictor.model.mask_threshold,
        predicted_iou=_finite(float(iou_C[best])),
        stability_score=stability_score(logits_HW, predictor.model.mask_threshold),
        point_coords=points,
        crop_box=[0, 0, logits_HW.shape[1], logits_HW.shape[0]],
    )


def stability_score(logits_HW: npt.NDArray[np.floating], threshold: float = 0.0) -> float | None:
    """IoU of the masks at `threshold` + 1 and - 1, 0 to 1; None where both are empty.

    As `calculate_stability_score` in segment_anything/utils/amg.py, whose sums overflow beyond 32,767 columns.
    """
    either = int((logits_HW > threshold - STABILITY_OFFSET).sum())
    both = int((logits_HW > threshold + STABILITY_OFFSET).sum())
    return both / either if either else None


def _everything(predictor: _TimedPredictor, image_HWC: npt.NDArray[np.uint8]) -> list[Mask]:
    height, width = image_HWC.shape[:2]
    generator = SamAutomaticMaskGenerator(
        predictor.model,
        points_per_batch=max(1, min(POINTS_AT_ONCE, PIXELS_AT_ONCE // (height * width))),
        output_mode="coco_rle",
    )
    generator.predictor = predictor
    found: list[dict[str, Any]] = generator.generate(image_HWC)
    masks = [
        Mask(
            size=(height, width),
            counts=record["segmentation"]["counts"],
            predicted_iou=record["predicted_iou"],
            stability_score=record["stability_score"],
            point_coords=record["point_coords"],
            crop_box=record["crop_box"],
        )
        for record in found
    ]
    return sorted(masks, key=lambda mask: -mask.area)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
