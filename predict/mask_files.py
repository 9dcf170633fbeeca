"""Masks of an image: run-length encoded in memory, and written as a folder of PNG files or as SA-1B's JSON.

Shape suffixes: H, W rows and columns of an image or mask.
"""

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

from ..common.durable import explain_os_errors
from ..common.errors import PredictError, shown
from ..common.outputs import read_mark
from .outputs import MASK, Outputs, check_writable, is_partial

SOFTWARE = "mobilesam"
"""Value of the text field "Software" of each PNG."""

_MASK_NAME = re.compile(r"\d{3,}\.png")


@dataclass(frozen=True, kw_only=True)
class Mask:
    """One mask of an image, kept run-length encoded: a photo may have hundreds."""

    size: tuple[int, int]
    """Height and width of the image."""
    counts: str
    """COCO's compressed runs."""
    predicted_iou: float | None
    """SAM's own estimate of the mask's IoU; None if it isn't finite."""
    stability_score: float | None
    """IoU of the masks at logits above 1 and above -1, 0 to 1; None if both are empty."""
    point_coords: Sequence[Sequence[float]]
    """x, y in pixels of each foreground point of the prompt."""
    crop_box: Sequence[float]
    """x, y, width and height in pixels of the part of the image that the mask was predicted from."""

    @classmethod
    def from_pixels(cls, pixels_HW: npt.NDArray[np.bool_], **fields: Any) -> Mask:
        """Encode a mask given as pixels.

        Args:
            pixels_HW: bool (H, W), True inside the mask.
            fields: all fields of the mask but `size` and `counts`.
        """
        runs = coco.encode(np.asfortranarray(pixels_HW, dtype=np.uint8))
        height, width = pixels_HW.shape
        return cls(size=(height, width), counts=runs["counts"].decode("ascii"), **fields)

    @property
    def segmentation(self) -> dict[str, Any]:
        """COCO's compressed RLE as JSON values, `size` and `counts`, which pycocotools decodes."""
        return {"size": list(self.size), "counts": self.counts}

    @property
    def area(self) -> int:
        """Number of pixels inside."""
        return int(coco.area(self.segmentation))

    @property
    def bbox(self) -> list[int]:
        """x, y, width and height in pixels of the mask's bounding box; zeros if it is empty.

        COCO's convention. SamAutomaticMaskGenerator's boxes are one pixel narrower and lower than the mask.
        """
        return [int(number) for number in coco.toBbox(self.segmentation)]

    def pixels(self) -> npt.NDArray[np.bool_]:
        """Decode to bool (H, W), true inside."""
        return coco.decode(self.segmentation).view(np.bool_)


def encode_mask(mask: Mask) -> bytes:
    """Encode a mask as an 8-bit greyscale PNG: 255 inside, 0 outside."""
    text = PngInfo()
    text.add_text("Software", SOFTWARE)
    buffer = io.BytesIO()
    Image.fromarray(mask.pixels().astype(np.uint8) * 255).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def encode_rle(masks: Sequence[Mask], file_name: str, original_size: tuple[int, int]) -> bytes:
    """Encode the masks of one image in the JSON layout of SA-1B, whose RLE pycocotools decodes.

    The image has no `image_id`. `predicted_iou` and `stability_score` are null where they are undefined.

    Args:
        masks: masks in order; a mask's `id` is its index.
        file_name: the image's file name, without its folder.
        original_size: height and width of the image in pixels.
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


def mask_name(index: int) -> str:
    """Return the file name of the mask with this index: 000.png, 001.png, ..."""
    return f"{index:03d}.png"


def check_masks_folder(path: Path, option: str = "--masks") -> None:
    """Refuse a folder that can't be written to, or that holds files other than masks of an earlier run.

    Args:
        path: folder of the masks; may not exist yet.
        option: option of the command line that names it, for messages.

    Raises:
        PredictError: the folder is refused; the message names the first of the other files, if there are any.
    """
    with explain_os_errors(path, PredictError, option):
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
    """Write the masks as PNG files 000.png, 001.png, ... in a folder, through `outputs`.

    Args:
        outputs: output files of the command; the caller commits them.
        path: folder that passed `check_masks_folder`; made if it doesn't exist.
        masks: masks in order.
        option: option of the command line that names the folder, for messages.

    Returns:
        The files of an earlier run in that folder, for `outputs.commit` to remove.

    Raises:
        PredictError: a file can't be written.
    """
    outputs.make_folder(path, option)
    with explain_os_errors(path, PredictError, option):
        stale = [file for file in path.iterdir() if _is_ours(file)]
    for index, mask in enumerate(masks):
        outputs.add(path / mask_name(index), encode_mask(mask), option, MASK, _is_older_mask)
    return stale


def _is_ours(file: Path) -> bool:
    """Return True if an earlier run wrote the file: a mask, or a temporary file left behind by a kill.

    Other numbered pictures, and masks that were edited since, must not be deleted.
    """
    if is_partial(file):
        return file.is_file()
    if not _MASK_NAME.fullmatch(file.name) or not file.is_file():
        return False
    try:
        mark = read_mark(file)
    except OSError:
        return False
    return _is_older_mask(file) if mark is None else mark.kind == MASK and mark.intact


def _is_older_mask(file: Path) -> bool:
    """Return True if the file is a mask that a version without marks wrote."""
    try:
        with PngImageFile(file) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for other content
        return False
