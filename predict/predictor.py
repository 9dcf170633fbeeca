"""Prediction of masks for an image and prompts by a SAM, with the seconds that it took.

Shape suffixes: H, W rows and columns of an image or mask, C channels, N points of one prompt, T mask tokens of a
prompt (SAM's single mask, or its three), 2 (x, y), 4 (x0, y0, x1, y1).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import Sam

from ..common.errors import counted
from ..sam import DecodedImage, image_pixels, resize_longest_side, resized_size
from ..sam.modeling.neck import input_side
from .mask_files import Mask
from .prompts import ImagePrompts, ObjectPrompt

STABILITY_OFFSET = 1.0
"""Offset from the mask threshold in logits; SamAutomaticMaskGenerator's default."""

POINTS_AT_ONCE = 64
"""Largest number of points decoded together; SamAutomaticMaskGenerator's default."""

MASKS_OF_A_POINT = 3
"""Masks predicted for a point, which is ambiguous."""

PIXELS_AT_ONCE = 2**26
"""Largest product of points decoded together and pixels of the image: 64 points on a photo of a megapixel. A point
has three masks of logits, 800 MB in all; with 64 points for any photo, 12 megapixels would take 10 GB."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Masks of an image, and the seconds that they took."""

    masks: list[Mask]
    """Masks in the order of the boxes; for everything by area, the largest first."""
    embedding_seconds: float
    """Time for resizing, normalising and the image encoder."""
    mask_seconds: float
    """Time for prompt encoder, mask decoder, and turning logits into masks."""
    note: str | None = None
    """Reason if nothing was found in a search for everything."""


def predict(
    sam: Sam,
    image_HWC: npt.NDArray[np.uint8],
    prompts: ImagePrompts,
    points_done: Callable[[int, int], None] = lambda done, total: None,
) -> Prediction:
    """Segment an image.

    For a single point, which is ambiguous, the one of SAM's three masks with the highest predicted IoU is chosen; for
    other prompts SAM's single mask. Everything is segmented by SamAutomaticMaskGenerator with its defaults.

    Args:
        sam: SAM, such as the `sam` of a `Model`.
        image_HWC: uint8 RGB (H, W, 3).
        prompts: prompts inside the image.
        points_done: for everything, called with the number of points whose masks are predicted, and the total: first
            with 0, after the image was embedded.

    Returns:
        One mask for each object; for everything, as many masks as are found.
    """
    predictor = _WatchedPredictor(sam, points_done)
    start, note = time.perf_counter(), None
    if prompts.everything:
        masks, note = _predict_everything(predictor, image_HWC)
    else:
        predictor.set_image(image_HWC)
        masks = [_predict_object(predictor, prompt) for prompt in prompts.objects()]
    seconds = time.perf_counter() - start
    return Prediction(
        masks=masks,
        embedding_seconds=predictor.seconds,
        mask_seconds=seconds - predictor.seconds,
        note=note,
    )


def stability_score(logits_HW: npt.NDArray[np.floating], threshold: float = 0.0) -> float | None:
    """Return the IoU of the masks at `threshold` + 1 and at `threshold` - 1.

    Source: `calculate_stability_score` in segment_anything/utils/amg.py, whose sums overflow beyond 32,767 columns.

    Args:
        logits_HW: float (H, W), mask logits.
        threshold: logit above which a pixel is inside the mask.

    Returns:
        0 to 1; None if both masks are empty.
    """
    either = int((logits_HW > threshold - STABILITY_OFFSET).sum())
    both = int((logits_HW > threshold + STABILITY_OFFSET).sum())
    return both / either if either else None


class StudentPredictor(SamPredictor):
    """segment_anything's predictor for students of any input size.

    Photos are resized to the student's own size; prompts, masks and everything else stay as in `SamPredictor`.

    Args:
        sam_model: SAM, such as the `sam` of a `Model`.
    """

    def set_image(self, image: npt.NDArray[np.uint8], image_format: str = "RGB") -> None:
        """Embed a photo, as `SamPredictor.set_image` does: uint8 (H, W, 3), `image_format` "RGB" or "BGR"."""
        encoder = self.model.image_encoder
        size = input_side(encoder, encoder.img_size)
        if size == encoder.img_size:
            super().set_image(image, image_format)
            return
        pixels_HWC = resize_longest_side(
            image if image_format == self.model.image_format else image[..., ::-1], size
        )
        original_size = image.shape[0], image.shape[1]
        photo = DecodedImage(
            pixels_HWC=pixels_HWC,
            original_size=original_size,
            resized_size=(pixels_HWC.shape[0], pixels_HWC.shape[1]),
        )
        self.reset_image()
        with torch.no_grad():
            self.features = encoder(image_pixels(photo, size, self.device))
        self.original_size = original_size
        self.input_size = resized_size(*original_size, encoder.img_size)
        self.is_image_set = True


class _WatchedPredictor(StudentPredictor):
    """StudentPredictor that adds up the time of its image embeddings, and keeps the predicted IoUs of points.

    Args:
        sam: model to predict with.
        points_done: as for `predict`.
    """

    def __init__(self, sam: Sam, points_done: Callable[[int, int], None]) -> None:
        super().__init__(sam)
        self.seconds = 0.0
        self.ious: list[float] = []
        """Predicted IoUs of all masks of the points so far; for everything alone."""
        self.points = 0
        """Points of everything; 0 for other prompts."""
        self._points_done = points_done

    def set_image(self, image: npt.NDArray[np.uint8], image_format: str = "RGB") -> None:
        start = time.perf_counter()
        super().set_image(image, image_format)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - start
        self._report()

    def predict_torch(self, *args: Any, **kwargs: Any) -> Any:
        predicted = super().predict_torch(*args, **kwargs)
        if self.points:
            self.ious += predicted[1].flatten().tolist()
            self._report()
        return predicted

    def _report(self) -> None:
        if self.points:
            self._points_done(len(self.ious) // MASKS_OF_A_POINT, self.points)


def _predict_object(predictor: _WatchedPredictor, prompt: ObjectPrompt) -> Mask:
    logits_THW, iou_T, _ = predictor.predict(
        point_coords=prompt.coords_N2,
        point_labels=prompt.labels_N,
        box=prompt.box_4,
        multimask_output=prompt.ambiguous,
        return_logits=True,
    )
    best = int(np.argmax(iou_T))
    logits_HW = logits_THW[best]
    points = [] if prompt.coords_N2 is None else prompt.coords_N2[prompt.labels_N == 1].tolist()
    return Mask.from_pixels(
        logits_HW > predictor.model.mask_threshold,
        predicted_iou=_finite(float(iou_T[best])),
        stability_score=stability_score(logits_HW, predictor.model.mask_threshold),
        point_coords=points,
        crop_box=[0, 0, logits_HW.shape[1], logits_HW.shape[0]],
    )


def _predict_everything(
    predictor: _WatchedPredictor, image_HWC: npt.NDArray[np.uint8]
) -> tuple[list[Mask], str | None]:
    """Return the masks, the largest first; if there are none, also the reason."""
    height, width = image_HWC.shape[:2]
    generator = SamAutomaticMaskGenerator(
        predictor.model,
        points_per_batch=max(1, min(POINTS_AT_ONCE, PIXELS_AT_ONCE // (height * width))),
        output_mode="coco_rle",
    )
    generator.predictor = predictor
    predictor.points = sum(map(len, generator.point_grids))
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
    return sorted(masks, key=lambda mask: -mask.area), None if masks else _reason(predictor.ious, generator)


def _reason(ious: list[float], generator: SamAutomaticMaskGenerator) -> str:
    """Say which of SAM's two limits the masks miss, of which none is left."""
    limit, stability = generator.pred_iou_thresh, generator.stability_score_thresh
    likely = sum(iou > limit for iou in ious)
    if likely:
        fact = f"{likely:,} reach a predicted IoU of {limit:g}, and none of these a stability score of {stability:g}"
    else:
        best = max(filter(math.isfinite, ious), default=math.nan)
        fact = f"none reaches a predicted IoU of {limit:g} (the best {best:.3f})"
    points = len(ious) // MASKS_OF_A_POINT
    return (
        f"nothing found: of {counted(len(ious), 'mask')} for a grid of {counted(points, 'point')} "
        f"{fact}. These are SAM's limits for "
        "everything; --point and --box have none"
    )


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
