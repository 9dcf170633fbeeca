"""Prompts for objects whose masks are known, sampled by SAM's rule (SAM, appendix A, "Training algorithm").

Shape suffixes: P prompts, H and W pixels of the masks. Random numbers come from a generator on the CPU, a few for
each prompt, so that a seed gives the same prompts on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

BOX_NOISE = 0.1
"""Standard deviation of each side of a box, in sides of the box."""
BOX_NOISE_PIXELS = 20
"""The most that a side moves, in pixels of a square of 1024."""


def uniform_pixel(regions_PHW: Tensor, generator: torch.Generator) -> Tensor:
    """A pixel of each region, every one of its pixels as likely: int64 (P, 2), x and y.

    `regions_PHW` is bool. An empty region gives (0, 0); ask `any` first where that may happen.
    """
    flat_PL = regions_PHW.flatten(1)
    counts_P = flat_PL.sum(dim=1)
    uniform_P = torch.rand(len(flat_PL), generator=generator, dtype=torch.float64)
    uniform_P = uniform_P.to(flat_PL.device, non_blocking=True)
    # The n-th pixel of a region is the first at which n + 1 of them have been counted.
    nth_P = torch.minimum((uniform_P * counts_P).long(), (counts_P - 1).clamp(min=0))
    place_P = torch.searchsorted(flat_PL.cumsum(dim=1), nth_P[:, None] + 1)[:, 0]
    place_P = torch.where(counts_P > 0, place_P, 0)
    width = regions_PHW.shape[2]
    return torch.stack((place_P % width, place_P // width), dim=1)


def correction_pixel(
    masks_PHW: Tensor, answers_PHW: Tensor, inside_PHW: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A pixel of where the answers are wrong, and 1 where it belongs to the object, else 0: (P, 2) and (P,), int64.

    All masks are bool; `inside_PHW` is where the image is. Where an answer is right everywhere the pixel is one of
    the object.
    """
    wrong_PHW = (masks_PHW ^ answers_PHW) & inside_PHW
    perfect_P11 = ~wrong_PHW.flatten(1).any(dim=1)[:, None, None]
    pixels_P2 = uniform_pixel(torch.where(perfect_P11, masks_PHW, wrong_PHW), generator)
    rows = torch.arange(len(pixels_P2), device=pixels_P2.device)
    return pixels_P2, masks_PHW[rows, pixels_P2[:, 1], pixels_P2[:, 0]].long()


def noisy_box(masks_PHW: Tensor, generator: torch.Generator, noise_pixels: float) -> Tensor:
    """A box around each mask, its sides moved at random: float32 (P, 4), x0 y0 x1 y1, borders of pixels being whole.

    A side moves by a normal deviate of a tenth of the box's own length in that direction, `noise_pixels` at most.
    """
    height, width = masks_PHW.shape[1:]
    starts, ends = [], []
    for axis, length in ((1, width), (2, height)):
        seen_PL = masks_PHW.any(dim=axis)
        places_L = torch.arange(length, device=masks_PHW.device)
        starts.append(torch.where(seen_PL, places_L, length).amin(dim=1))
        ends.append(torch.where(seen_PL, places_L + 1, 0).amax(dim=1))
    box_P4 = torch.stack((*starts, *ends), dim=1).float()
    sides_P2 = (box_P4[:, 2:] - box_P4[:, :2]).repeat(1, 2)
    normal_P4 = torch.randn(len(box_P4), 4, generator=generator).to(box_P4.device, non_blocking=True)
    noise_P4 = normal_P4 * BOX_NOISE * sides_P2
    noisy_P4 = box_P4 + noise_P4.clamp(-noise_pixels, noise_pixels)
    x_P2, y_P2 = noisy_P4[:, 0::2].clamp(0, width), noisy_P4[:, 1::2].clamp(0, height)
    return torch.stack((x_P2, y_P2), dim=2).flatten(1)


def to_square(places: Tensor, image_size: int, side: int) -> Tensor:
    """Pixels of a mask of `side` x `side` in pixels of the encoder's square, centres being whole numbers: float32."""
    return (places.float() + 0.5) * (image_size / side) - 0.5


def borders_to_square(box_P4: Tensor, image_size: int, side: int) -> Tensor:
    """As `to_square`, for boxes whose whole numbers are borders of pixels: SAM counts those as centres are."""
    return box_P4 * (image_size / side) - 0.5
