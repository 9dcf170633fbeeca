"""The last step of SAM's preprocessing, on tensors and on any device."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from .images import PIXEL_MEAN, PIXEL_STD, DecodedImage, place_on_canvas


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
