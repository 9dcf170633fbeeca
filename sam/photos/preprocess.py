"""SAM's preprocessing: resize the longest side, place the pixels on a square canvas, normalise, pad.

Resizing is used in processes that never import torch; only the functions on tensors import it. Images that a store
keeps (`--keep-images`) are also encoded here.

Shape suffixes: B images, C channels, H and W rows and columns; S is the side of the encoder's square in pixels, g
the side of the embedding's grid (S / 16).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, features

from ...common.errors import ImageError, SamError
from .image_decode import decode_rgb

if TYPE_CHECKING:
    import torch

PATCH = 16
"""Pixels that one cell of the embedding grid covers in each direction."""

PIXEL_MEAN = (123.675, 116.28, 103.53)
"""Mean of R, G, B on the 0-255 scale. Source: segment_anything/build_sam.py."""

PIXEL_STD = (58.395, 57.12, 57.375)
"""Standard deviation of R, G, B on the 0-255 scale. Source: segment_anything/build_sam.py."""

KEPT_KIND = "webp"
"""Format of kept images: lossless WebP. At its fastest setting it gives the smallest files of the lossless formats
that Pillow writes (photos: two thirds of PNG), and decodes faster than PNG."""

TOO_THIN = "too thin"
"""First words of the reason why an image can't be resized."""

MAX_SIDE = 16383
"""Largest side of a kept image in pixels; the limit of WebP."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedImage:
    """Decoded and resized image."""

    pixels_HWC: np.ndarray
    """uint8 RGB (H, W, 3), read-only."""
    original_size: tuple[int, int]
    """(height, width) of the image after its EXIF orientation was applied."""
    resized_size: tuple[int, int]
    """(height, width) of `pixels_HWC`."""


def resized_size(height: int, width: int, image_size: int = 1024) -> tuple[int, int]:
    """Compute the size of an image after resizing its longest side.

    Args:
        height: height of the original image, in pixels.
        width: its width, in pixels.
        image_size: new length of the longest side, in pixels.

    Returns:
        (height, width) in pixels.

    Raises:
        ImageError: the image is so thin that its short side would be 0 pixels.

    Source: segment_anything/utils/transforms.py (`ResizeLongestSide.get_preprocess_shape`), rounding included.
    """
    scale = image_size * 1.0 / max(height, width)
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    if min(size) < 1:
        raise ImageError(f"{TOO_THIN}: {width} x {height} pixels would be resized to {size[1]} x {size[0]}")
    return size


def resize_longest_side(image_HWC: np.ndarray, image_size: int) -> np.ndarray:
    """Resize an image's longest side to `image_size` by Pillow's antialiased bilinear filter.

    Bit-equal to `ResizeLongestSide.apply_image` in segment_anything/utils/transforms.py, SAM's reference.

    Args:
        image_HWC: uint8 RGB (H, W, 3).
        image_size: new length of the longest side, in pixels.

    Returns:
        uint8 RGB (H, W, 3) of the new size, read-only.

    Raises:
        ImageError: the image is so thin that its short side would be 0 pixels.
    """
    return np.asarray(_resize(Image.fromarray(image_HWC), image_size))


def load_image(data: bytes, image_size: int = 1024) -> DecodedImage:
    """Decode an image file and resize its longest side.

    Args:
        data: bytes of the file; `decode_image` documents the decoding.
        image_size: new length of the longest side, in pixels.

    Returns:
        The resized pixels, and the sizes before and after.

    Raises:
        ImageError: the bytes are no usable image; the message is a one-line reason.
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
    """Write an image into the top-left corner of a canvas, and black everywhere else.

    Args:
        image: image of at most S pixels in height and width.
        canvas_HWC: uint8 (S, S, 3), all of which is overwritten.
    """
    height, width = image.resized_size
    canvas_HWC[:height, :width] = image.pixels_HWC
    canvas_HWC[:height, width:] = 0
    canvas_HWC[height:] = 0


def valid_cells(resized_size: tuple[int, int], image_size: int = 1024) -> np.ndarray:
    """Mark the cells of the embedding's grid that lie on the image rather than on padding.

    Cell (row i, column j) is valid if its centre, the pixel in row 16 i + 8 and column 16 j + 8, lies inside the
    resized image. An image thinner than half a cell keeps its first row or column, so that every image has a valid
    cell and no mean divides by zero.

    Args:
        resized_size: (height, width) of the image on the encoder's square, in pixels.
        image_size: side of the square in pixels, a multiple of 16.

    Returns:
        bool (g, g), rows first; g is `image_size` / 16.
    """
    centres = np.arange(image_size // PATCH) * PATCH + PATCH // 2
    rows, columns = centres < resized_size[0], centres < resized_size[1]
    rows[0] = columns[0] = True
    return rows[:, None] & columns[None, :]


def preprocessing_recipe(image_size: int = 1024) -> dict[str, Any]:
    """Return every step from a file's bytes to the teacher's input as JSON values, to be stored and compared."""
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


def image_pixels(image: DecodedImage, image_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Convert one image to an encoder's input.

    Args:
        image: image whose longest side is at most `image_size`.
        image_size: S, side of the encoder's square, in pixels.
        device: device of the result.

    Returns:
        float32 (1, 3, S, S), normalised and padded.
    """
    import torch

    canvas_HWC = np.empty((image_size, image_size, 3), dtype=np.uint8)
    place_on_canvas(image, canvas_HWC)
    sizes_12 = torch.tensor([image.resized_size]).to(device)
    return normalize_and_pad(torch.from_numpy(canvas_HWC)[None].to(device), sizes_12)


def normalize_and_pad(canvas_BHWC: torch.Tensor, sizes_B2: torch.Tensor) -> torch.Tensor:
    """Normalise the image in the top-left corner of each canvas, and set everything else to exactly 0.

    Bit-equal to `Sam.preprocess` (segment_anything/modeling/sam.py), which normalises on the 0-255 scale and pads
    with zeros afterwards.

    Args:
        canvas_BHWC: uint8 RGB (B, S, S, 3) on any device; pixels outside the images are ignored.
        sizes_B2: integer (B, 2), each image's (height, width) on its canvas in pixels, on any device.

    Returns:
        pixels_BCHW: float32 (B, 3, S, S), contiguous, on the canvas's device.
    """
    import torch

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


def refuse_keeping(image_size: int) -> None:
    """Raise SamError if this machine can't encode kept images of this size (pixels)."""
    if image_size > MAX_SIDE:
        raise SamError(
            f"images of {image_size} pixels can't be kept: WebP's limit is {MAX_SIDE}; leave out --keep-images"
        )
    if not features.check("webp"):
        raise SamError(
            "this Pillow was built without WebP, the format of kept images: install one of Pillow's wheels"
        )


def encode_kept(pixels_HWC: np.ndarray) -> bytes:
    """Encode a resized image losslessly as the file that a store keeps.

    The file is decoded again to verify it.

    Args:
        pixels_HWC: uint8 RGB (H, W, 3), at most MAX_SIDE high and wide.

    Returns:
        Bytes of an image file from which `load_image` returns the same pixels.

    Raises:
        ImageError: decoding gave other pixels.
    """
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, KEPT_KIND, lossless=True, quality=0, method=0)
    data = file.getvalue()
    with Image.open(io.BytesIO(data)) as image:
        if not np.array_equal(np.asarray(image), pixels_HWC):
            raise ImageError(f"its {KEPT_KIND} copy has other pixels: check this machine's Pillow and memory")
    return data


def _resize(image: Image.Image, image_size: int) -> Image.Image:
    height, width = resized_size(image.height, image.width, image_size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


@cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation, each (3, 1, 1), on a device; cached, since a copy waits for the GPU."""
    import torch

    mean_C11, std_C11 = (torch.tensor(values).view(3, 1, 1).to(device) for values in (PIXEL_MEAN, PIXEL_STD))
    return mean_C11, std_C11
