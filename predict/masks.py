"""One mask and what is known of it. Pixels are kept run-length encoded: a photo may have hundreds of masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A mask of an image of `size` (height, width).

    `counts` are COCO's compressed runs. `predicted_iou` is SAM's own guess of the mask's quality; `stability_score`
    the IoU of the masks at logits above 1 and above -1. Either is None where it is undefined. `point_coords` are
    the points on the object that SAM was given, and `crop_box` (x, y, width, height) the part of the image it saw.
    """

    size: tuple[int, int]
    counts: str
    predicted_iou: float | None
    stability_score: float | None
    point_coords: Sequence[Sequence[float]]
    crop_box: Sequence[float]

    @classmethod
    def of(cls, pixels_HW: npt.NDArray[np.bool_], **known: Any) -> Mask:
        """The mask whose pixels are true in `pixels_HW`; `known` are the other fields."""
        runs = coco.encode(np.asfortranarray(pixels_HW, dtype=np.uint8))
        height, width = pixels_HW.shape
        return cls(size=(height, width), counts=runs["counts"].decode("ascii"), **known)

    @property
    def segmentation(self) -> dict[str, Any]:
        """COCO's compressed RLE, its counts as text: JSON values that pycocotools takes."""
        return {"size": list(self.size), "counts": self.counts}

    @property
    def area(self) -> int:
        """Pixels that are in it."""
        return int(coco.area(self.segmentation))

    @property
    def bbox(self) -> list[int]:
        """x, y, width and height of the smallest box around it, counting pixels; zeros where it is empty.

        COCO's convention. SamAutomaticMaskGenerator's boxes are one pixel narrower and lower than the mask.
        """
        return [int(number) for number in coco.toBbox(self.segmentation)]

    def pixels(self) -> npt.NDArray[np.bool_]:
        """Which pixels are in it, bool (height, width)."""
        return coco.decode(self.segmentation).view(np.bool_)
