"""Masks as files: a folder of pictures, and SA-1B's JSON."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from pycocotools import mask as coco

from ..common.errors import PredictError, shown
from .outputs import PARTIAL, Outputs, check_writable, explained

SOFTWARE = "mobilesam"
"""In the text of each PNG: a folder of someone's numbered pictures must not pass for masks of an earlier run."""

_MASK = re.compile(r"\d{3,}\.png")
_PARTIAL = re.compile(rf"\.[0-9a-f]{{8}}{re.escape(PARTIAL)}")


def mask_name(index: int) -> str:
    """The file of the mask of this number: 000.png, 001.png, ..."""
    return f"{index:03d}.png"


def check_masks_folder(path: Path, option: str = "--masks") -> None:
    """Refuses a folder that masks can't be written to, or that holds other files than an earlier run's masks.

    Raises PredictError.
    """
    with explained(path, option):
        if not path.exists():
            return check_writable(path.resolve().parent, option)
        if not path.is_dir():
            raise PredictError(f"{option} {shown(str(path))} is a file: give a folder's name")
        others = sorted(file.name for file in path.iterdir() if not _is_ours(file))
        if others:
            raise PredictError(
                f"{option} {shown(str(path))} holds {len(others):,} other files, such as {shown(others[0])}: "
                "give a new or empty folder"
            )
        check_writable(path, option)


def add_masks(outputs: Outputs, path: Path, masks: Sequence[Mask], option: str = "--masks") -> list[Path]:
    """Adds a PNG of each mask; returns what an earlier run left in the folder, to be removed."""
    outputs.make_folder(path, option)
    with explained(path, option):
        stale = [file for file in path.iterdir() if _is_ours(file)]
    for index, mask in enumerate(masks):
        outputs.add(path / mask_name(index), encode_mask(mask), option)
    return stale


def encode_mask(mask: Mask) -> bytes:
    """An 8-bit grey PNG: 255 where the mask is, else 0."""
    text = PngInfo()
    text.add_text("Software", SOFTWARE)
    buffer = io.BytesIO()
    Image.fromarray(mask.pixels().astype(np.uint8) * 255).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def encode_rle(masks: Sequence[Mask], file_name: str, original_size: tuple[int, int]) -> bytes:
    """Masks of an image of `original_size` (height, width) in the JSON layout of SA-1B, which pycocotools reads.

    The image has no `image_id`. `predicted_iou` and `stability_score` are null where they are undefined.
    """
    height, width = original_size
    annotations = [
        {
            "id": index,
            "segmentation": mask.segmentation,
            "area": mask.area,
            "bbox": mask.bbox,
            "predicted_iou": mask.predicted_iou,
            "stability_score": mask.stability_score,
            "crop_box": mask.crop_box,
            "point_coords": mask.point_coords,
        }
        for index, mask in enumerate(masks)
    ]
    image = {"width": width, "height": height, "file_name": file_name}
    return json.dumps({"image": image, "annotations": annotations}).encode()


def _is_ours(file: Path) -> bool:
    if _PARTIAL.fullmatch(file.name):  # of a run that was killed
        return file.is_file()
    if not _MASK.fullmatch(file.name) or not file.is_file():
        return False
    try:
        with PngImageFile(file) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for other content
        return False


# --- One mask and what is known of it. Pixels are kept run-length encoded: a photo may have hundreds of masks.


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
