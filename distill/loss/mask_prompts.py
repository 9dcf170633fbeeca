"""Prompts for objects whose masks are known, sampled by SAM's rule (SAM, appendix A, "Training algorithm").

Random numbers come from a generator on the CPU, a few for each prompt, so that a seed gives the same prompts on every
device.

Shape suffixes: P prompts (one per object), N points of a prompt, H and W rows and columns of a mask, M side of a
square one, h and w rows and columns of low-resolution masks (4g), L positions of a flattened mask or of one of its
axes, 1 one, 2 (x, y), 4 (x0, y0, x1, y1).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...sam.modeling.decode_prompts import Prompts

BOX_NOISE = 0.1
"""Standard deviation of the position of each side of a box, as a share of the box's length in that direction."""
BOX_NOISE_PIXELS = 20
"""Largest shift of a box's side, in pixels of a square of 1024."""


def point_prompts(regions_PMM: Tensor, image_size: int, generator: torch.Generator) -> Prompts:
    """Return prompts of one foreground point each, drawn uniformly from the prompt's region.

    Args:
        regions_PMM: bool (P, M, M) over the encoder's square; an empty region gives its top-left pixel.
        image_size: side of the encoder's square in pixels.
        generator: generator on the CPU.
    """
    pixels_P2 = uniform_pixel(regions_PMM, generator)
    return Prompts.of_points(pixels_to_square(pixels_P2, image_size, regions_PMM.shape[-1]))


def box_prompts(masks_PMM: Tensor, image_size: int, generator: torch.Generator) -> Prompts:
    """Return prompts of one noisy box each, around the mask.

    Args:
        masks_PMM: bool (P, M, M) over the encoder's square.
        image_size: side of the encoder's square in pixels.
        generator: generator on the CPU.
    """
    side = masks_PMM.shape[-1]
    boxes_P4 = noisy_box(masks_PMM, generator, BOX_NOISE_PIXELS * side / 1024)
    return Prompts.of_boxes(borders_to_square(boxes_P4, image_size, side))


def corrected_prompts(
    prompts: Prompts,
    masks_PMM: Tensor,
    answers_PMM: Tensor,
    answers_P1hw: Tensor,
    valid_PMM: Tensor,
    image_size: int,
    generator: torch.Generator,
) -> Prompts:
    """Return the prompts with one more point, drawn from the error region, and the predicted mask as mask prompt.

    Args:
        prompts: prompts of the last round.
        masks_PMM: bool (P, M, M), the objects' masks over the encoder's square.
        answers_PMM: bool (P, M, M), the masks predicted for `prompts`.
        answers_P1hw: float32 (P, 1, 4g, 4g), low-resolution logits of the predicted masks, detached.
        valid_PMM: bool (P, M, M), True for pixels of the image, not of the padding.
        image_size: side of the encoder's square in pixels.
        generator: generator on the CPU.
    """
    pixels_P2, labels_P = correction_pixel(masks_PMM, answers_PMM, valid_PMM, generator)
    points_P2 = pixels_to_square(pixels_P2, image_size, masks_PMM.shape[-1])
    return replace(
        prompts,
        points_PN2=torch.cat((prompts.points_PN2, points_P2[:, None]), dim=1),
        labels_PN=torch.cat((prompts.labels_PN, labels_P[:, None]), dim=1),
        masks_P1hw=answers_P1hw,
    )


def uniform_pixel(regions_PHW: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one pixel of each region uniformly.

    Args:
        regions_PHW: bool (P, H, W). An empty region gives (0, 0); test `any` first where that may happen.
        generator: generator on the CPU.

    Returns:
        int64 (P, 2), x and y.
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
    masks_PHW: Tensor, answers_PHW: Tensor, valid_PHW: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one wrong pixel of each predicted mask; where a mask has no error, one pixel of the object.

    Args:
        masks_PHW: bool (P, H, W), the objects' masks.
        answers_PHW: bool (P, H, W), the predicted masks.
        valid_PHW: bool (P, H, W), True for pixels of the image; errors elsewhere don't count.
        generator: generator on the CPU.

    Returns:
        int64 (P, 2), x and y, and int64 (P,), 1 where the pixel belongs to the object, else 0.
    """
    wrong_PHW = (masks_PHW ^ answers_PHW) & valid_PHW
    perfect_P11 = ~wrong_PHW.flatten(1).any(dim=1)[:, None, None]
    pixels_P2 = uniform_pixel(torch.where(perfect_P11, masks_PHW, wrong_PHW), generator)
    rows = torch.arange(len(pixels_P2), device=pixels_P2.device)
    return pixels_P2, masks_PHW[rows, pixels_P2[:, 1], pixels_P2[:, 0]].long()


def noisy_box(masks_PHW: Tensor, generator: torch.Generator, noise_pixels: float) -> Tensor:
    """Return a box around each mask, with noise on each side.

    The noise is normal, with a standard deviation of `BOX_NOISE` times the box's length in that direction.

    Args:
        masks_PHW: bool (P, H, W).
        generator: generator on the CPU.
        noise_pixels: largest shift of a side, in pixels of the mask.

    Returns:
        float32 (P, 4), x0 y0 x1 y1 within the mask; whole numbers are borders of pixels.
    """
    height, width = masks_PHW.shape[1:]
    starts, ends = [], []
    for axis, length in ((1, width), (2, height)):
        seen_PL = masks_PHW.any(dim=axis)
        places_L = torch.arange(length, device=masks_PHW.device)
        starts.append(torch.where(seen_PL, places_L, length).amin(dim=1))
        ends.append(torch.where(seen_PL, places_L + 1, 0).amax(dim=1))
    box_P4 = torch.stack((*starts, *ends), dim=1).float()
    sides_P4 = (box_P4[:, 2:] - box_P4[:, :2]).repeat(1, 2)
    normal_P4 = torch.randn(len(box_P4), 4, generator=generator).to(box_P4.device, non_blocking=True)
    noise_P4 = normal_P4 * BOX_NOISE * sides_P4
    noisy_P4 = box_P4 + noise_P4.clamp(-noise_pixels, noise_pixels)
    x_P2, y_P2 = noisy_P4[:, 0::2].clamp(0, width), noisy_P4[:, 1::2].clamp(0, height)
    return torch.stack((x_P2, y_P2), dim=2).flatten(1)


def pixels_to_square(pixels: Tensor, image_size: int, side: int) -> Tensor:
    """Return the centres of a mask's pixels in coordinates of the encoder's square.

    Args:
        pixels: column or row indices in a tensor of any shape, integers.
        image_size: side of the encoder's square in pixels; in SAM's coordinates, whole numbers are pixel centres.
        side: side of the mask in pixels.

    Returns:
        float32, in the shape of `pixels`.
    """
    return (pixels.float() + 0.5) * (image_size / side) - 0.5


def borders_to_square(boxes_P4: Tensor, image_size: int, side: int) -> Tensor:
    """Return boxes of a mask in coordinates of the encoder's square, as `pixels_to_square` does for pixels.

    Args:
        boxes_P4: float32 (P, 4), x0 y0 x1 y1 in pixels of the mask; whole numbers are borders of pixels.
        image_size: side of the encoder's square in pixels.
        side: side of the mask in pixels.

    Returns:
        float32 (P, 4), x0 y0 x1 y1; whole numbers are pixel centres, as SAM has them for boxes too.
    """
    return boxes_P4 * (image_size / side) - 0.5
