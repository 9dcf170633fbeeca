"""SAM's preprocessing up to the canvas: resize the longest side, lay the pixels into the top-left corner."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, features

from ..common.errors import ImageError, SamError
from .image_decode import decode_rgb

PATCH = 16
"""Pixels that one cell of the embedding grid covers in each direction."""

PIXEL_MEAN = (123.675, 116.28, 103.53)
"""Mean of R, G, B on the 0-255 scale (segment_anything/build_sam.py)."""

PIXEL_STD = (58.395, 57.12, 57.375)
"""Standard deviation of R, G, B on the 0-255 scale (segment_anything/build_sam.py)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedImage:
    """One image, decoded and resized."""

    pixels_HWC: np.ndarray
    """uint8 RGB (h, w, 3), read-only, `resized_size` high and wide."""
    original_size: tuple[int, int]
    """(height, width) of the picture as it is seen: after its EXIF orientation."""
    resized_size: tuple[int, int]
    """(height, width) of `pixels_HWC`."""


def resized_size(height: int, width: int, image_size: int = 1024) -> tuple[int, int]:
    """(height, width) once the longest side is `image_size`, rounded as `ResizeLongestSide.get_preprocess_shape`.

    Raises ImageError for a strip so thin that its short side would vanish.
    """
    scale = image_size * 1.0 / max(height, width)
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    if min(size) < 1:
        raise ImageError(f"too thin: {width} x {height} pixels would be resized to {size[1]} x {size[0]}")
    return size


def resize_longest_side(image_HWC: np.ndarray, image_size: int) -> np.ndarray:
    """Resize uint8 RGB (H, W, 3) to a longest side of `image_size`; returns uint8 (h, w, 3), read-only.

    Pillow's antialiased bilinear filter: bit-equal to `ResizeLongestSide.apply_image` in
    segment_anything/utils/transforms.py, the reference path of SAM.
    """
    return np.asarray(_resize(Image.fromarray(image_HWC), image_size))


def load_image(data: bytes, image_size: int = 1024) -> DecodedImage:
    """Decode an image file's bytes (policies: `decode_image`) and resize the longest side to `image_size`.

    Raises ImageError with the reason where the bytes are no image that can be used.
    """
    image = decode_rgb(data)
    original_size = (image.height, image.width)
    pixels_HWC = np.asarray(_resize(image, image_size))
    return DecodedImage(
        pixels_HWC=pixels_HWC,
        original_size=original_size,
        resized_size=(pixels_HWC.shape[0], pixels_HWC.shape[1]),
    )


def place_on_canvas(image: DecodedImage, canvas_HWC: np.ndarray) -> None:
    """Write a whole uint8 canvas (S, S, 3): the pixels in its top-left corner, black beyond them."""
    height, width = image.resized_size
    canvas_HWC[:height, :width] = image.pixels_HWC
    canvas_HWC[:height, width:] = 0
    canvas_HWC[height:] = 0


def valid_cells(resized_size: tuple[int, int], image_size: int = 1024) -> np.ndarray:
    """Which cells of the embedding grid show image, as bool (g, g) with g = image_size / 16.

    Cell (i, j) does if its centre, pixel (16 i + 8, 16 j + 8), lies inside the resized image. A strip thinner than
    half a cell keeps its first row or column: every image has a valid cell, and no mean divides by zero.
    """
    centres = np.arange(image_size // PATCH) * PATCH + PATCH // 2
    rows, columns = centres < resized_size[0], centres < resized_size[1]
    rows[0] = columns[0] = True
    return rows[:, None] & columns[None, :]


def preprocessing_recipe(image_size: int = 1024) -> dict[str, Any]:
    """What lies between a file's bytes and the teacher, as plain JSON values to save and to compare."""
    return {
        "version": 1,
        "decode": {
            "orientation": "EXIF applied",
            "alpha": "dropped",
            "grey16": "scaled to 8 bits by the full range",
            "frames": "first",
            "icc": "ignored",
        },
        "resize": {
            "image_size": image_size,
            "rule": "int(side * image_size / max(height, width) + 0.5)",
            "filter": "Pillow bilinear, antialiased, uint8",
        },
        "normalize": {"mean": list(PIXEL_MEAN), "std": list(PIXEL_STD), "scale": "0-255", "channels": "RGB"},
        "pad": "zeros, right and bottom, after normalising",
    }


def _resize(image: Image.Image, image_size: int) -> Image.Image:
    height, width = resized_size(image.height, image.width, image_size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


# --- The last step of SAM's preprocessing, on tensors and on any device.


def image_pixels(image: DecodedImage, image_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """One image as encoders take it: float32 (1, 3, S, S) on `device`, S being `image_size`."""
    canvas_HWC = np.empty((image_size, image_size, 3), dtype=np.uint8)
    place_on_canvas(image, canvas_HWC)
    sizes_12 = torch.tensor([image.resized_size]).to(device)
    return normalize_and_pad(torch.from_numpy(canvas_HWC)[None].to(device), sizes_12)


def normalize_and_pad(canvas_BHWC: torch.Tensor, sizes_B2: torch.Tensor) -> torch.Tensor:
    """Normalise the image in the top-left corner of each canvas; everything else becomes exactly 0.

    Args:
        canvas_BHWC: uint8 RGB (B, S, S, 3) on any device; what lies outside the images does not matter.
        sizes_B2: integer (B, 2), each image's (height, width) on its canvas, on any device.

    Returns:
        pixels_BCHW: float32 (B, 3, S, S), contiguous, on the canvas's device. Bit-equal to `Sam.preprocess`
        (segment_anything/modeling/sam.py), which normalises on the 0-255 scale and pads with zeros AFTER that.
    """
    device = canvas_BHWC.device
    _, height, width, _ = canvas_BHWC.shape
    mean_C11, std_C11 = _statistics(device)
    pixels_BCHW = canvas_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    pixels_BCHW.sub_(mean_C11).div_(std_C11)
    sizes_B2 = sizes_B2.to(device, non_blocking=True)
    rows_BH = torch.arange(height, device=device) < sizes_B2[:, :1]
    columns_BW = torch.arange(width, device=device) < sizes_B2[:, 1:]
    inside_B1HW = rows_BH[:, None, :, None] & columns_BW[:, None, None, :]
    return pixels_BCHW.masked_fill_(~inside_B1HW, 0.0)


@cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (3, 1, 1) on a device, copied once: each copy would make a GPU's queue drain."""
    mean_C11, std_C11 = (torch.tensor(values).view(3, 1, 1).to(device) for values in (PIXEL_MEAN, PIXEL_STD))
    return mean_C11, std_C11


# --- Resized images as files that a store keeps: what the teacher saw, to the pixel.

KEPT_KIND = "webp"
"""Lossless WebP. Of the lossless kinds that Pillow writes it is the smallest at its fastest setting (photos: two
thirds of PNG), and read faster than PNG."""

MAX_SIDE = 16383
"""Pixels; WebP's own limit."""


def refuse_keeping(image_size: int) -> None:
    """SamError where images of this size can't be kept on this machine."""
    if image_size > MAX_SIDE:
        raise SamError(
            f"images of {image_size} pixels can't be kept: WebP ends at {MAX_SIDE}; leave out --keep-images"
        )
    if not features.check("webp"):
        raise SamError(
            "this Pillow was built without WebP, which kept images are: install one of Pillow's wheels"
        )


def encode_kept(pixels_HWC: np.ndarray) -> bytes:
    """uint8 RGB (h, w, 3) as an image file from which `load_image` gives the very same pixels.

    It is decoded again to make sure; ImageError when another picture comes out.
    """
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, KEPT_KIND, lossless=True, quality=0, method=0)
    data = file.getvalue()
    with Image.open(io.BytesIO(data)) as image:
        if not np.array_equal(np.asarray(image), pixels_HWC):
            raise ImageError(
                f"its {KEPT_KIND} copy has other pixels: is this machine's Pillow, or memory, sound?"
            )
    return data
