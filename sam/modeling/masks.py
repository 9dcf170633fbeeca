"""Masks of foreground points, decoded by SAM's head from given embeddings.

Shape suffixes: P prompts (p some of them), C channels, H and W rows and columns of an image or of the embedding's
grid, h and w those of low-resolution masks (4g), 2 (x, y); g is the side of the embedding's grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .head import SamHead

MASK_THRESHOLD = 0.0
"""Logit above which a pixel belongs to the mask."""

PROMPTS_AT_ONCE = {"cpu": 4, "cuda": 32}
"""Prompts that are decoded together, by device type. On a CPU, 16 at once take twice as long as four times 4, whose
tensors fit its caches better."""

SAMPLES = 3
"""Samples along each side of a drawn pixel: ten shades at the edge of a mask."""

PIXELS_AT_ONCE = 2**24
"""Most logits at an image's full size that are held together: 64 MiB. Masks of a larger image are made one by one."""


def point_masks(
    head: SamHead,
    emb_1CHW: Tensor,
    points_P2: npt.NDArray[np.floating],
    original_size: tuple[int, int],
    resized_size: tuple[int, int],
) -> Tensor:
    """Compute the mask of each of P foreground points, as SamPredictor.predict_torch does.

    Args:
        head: SAM's head, in evaluation mode, on the embedding's device.
        emb_1CHW: (1, 256, g, g), embedding of the image.
        points_P2: (P, 2), x and y in pixels of the original image; each point is a separate prompt.
        original_size: (height, width) of the image in pixels.
        resized_size: (height, width) of the resized image on the encoder's square, in pixels.

    Returns:
        bool (P, H, W) at the original size, on the embedding's device: SAM's single mask of each point. Computed in
        float32, even under autocast.
    """
    chunks = mask_chunks([(head, emb_1CHW)], points_P2, original_size, resized_size)
    return torch.cat([masks_pHW for (masks_pHW,) in chunks])


@torch.no_grad()
def mask_chunks(
    pairs: Sequence[tuple[SamHead, Tensor]],
    points_P2: npt.NDArray[np.floating],
    original_size: tuple[int, int],
    resized_size: tuple[int, int],
) -> Iterator[list[Tensor]]:
    """Compute `point_masks` for several embeddings of one image, a few points at a time, so that memory is bounded.

    A chunk and its logits take about 4 bytes per pixel, and 1 more for each pair, for PIXELS_AT_ONCE pixels or one
    image, whichever is more.

    Args:
        pairs: head and embedding (1, 256, g, g) of each model, all of the same image size and device.
        points_P2: (P, 2), x and y in pixels of the original image; each point is a separate prompt.
        original_size: (height, width) of the image in pixels.
        resized_size: (height, width) of the resized image on the encoder's square, in pixels.

    Yields:
        One bool (p, H, W) for each pair, for the same p points, in order.
    """
    size, prompts = pairs[0][0].image_size, PROMPTS_AT_ONCE[pairs[0][1].device.type]
    at_once = max(1, PIXELS_AT_ONCE // (original_size[0] * original_size[1]))
    for start in range(0, len(points_P2), prompts):
        points_p2 = points_P2[start : start + prompts]
        logits = [
            point_logits(head, emb_1CHW, points_p2, original_size, resized_size) for head, emb_1CHW in pairs
        ]
        for parts in zip(*(logits_p1hw.split(at_once) for logits_p1hw in logits), strict=True):
            yield [upscale_masks(part, size, original_size, resized_size) for part in parts]


@torch.no_grad()
def point_logits(
    head: SamHead,
    emb_1CHW: Tensor,
    points_p2: npt.NDArray[np.floating],
    original_size: tuple[int, int],
    resized_size: tuple[int, int],
) -> Tensor:
    """Decode the low-resolution logits of a few foreground points, all at once (see PROMPTS_AT_ONCE).

    Args:
        head: SAM's head, in evaluation mode, on the embedding's device.
        emb_1CHW: (1, 256, g, g), embedding of the image.
        points_p2: (p, 2), x and y in pixels of the original image; each point is a separate prompt.
        original_size: (height, width) of the image in pixels.
        resized_size: (height, width) of the resized image on the encoder's square, in pixels.

    Returns:
        float32 (p, 1, 4g, 4g) over the encoder's whole square, on the embedding's device. Computed in float32, even
        under autocast.
    """
    coords_p12 = to_square(points_p2, original_size, resized_size).to(emb_1CHW.device)[:, None]
    labels_p1 = torch.ones(len(coords_p12), 1, dtype=torch.int, device=emb_1CHW.device)
    with torch.autocast(emb_1CHW.device.type, enabled=False):
        sparse, dense = head.prompt_encoder(points=(coords_p12, labels_p1), boxes=None, masks=None)
        logits_p1hw, _ = head.mask_decoder(
            # Contiguous: equal embeddings must give equal masks, for any memory layout that an encoder produced.
            image_embeddings=emb_1CHW.float().contiguous(),
            image_pe=head.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
    return logits_p1hw


def to_square(
    points: npt.NDArray[np.floating], original_size: tuple[int, int], resized_size: tuple[int, int]
) -> Tensor:
    """Convert points from pixels of the original image to pixels of the encoder's square.

    Args:
        points: (..., 2), x and y in pixels of the original image.
        original_size: (height, width) of the image in pixels.
        resized_size: (height, width) of the resized image on the encoder's square, in pixels.

    Returns:
        float32 (..., 2), x and y; computed in float64, as in ResizeLongestSide.apply_coords.
    """
    scale_2 = np.array([resized_size[1] / original_size[1], resized_size[0] / original_size[0]])
    return torch.as_tensor(points * scale_2, dtype=torch.float32)


def upscale_masks(
    logits_p1hw: Tensor, image_size: int, original_size: tuple[int, int], resized_size: tuple[int, int]
) -> Tensor:
    """Upscale low-resolution logits to masks at the original size, in the two steps of Sam.postprocess_masks.

    Args:
        logits_p1hw: float32 (p, 1, 4g, 4g) over the encoder's square.
        image_size: side of the square in pixels.
        original_size: (height, width) of the image in pixels.
        resized_size: (height, width) of the resized image on the square, in pixels.

    Returns:
        bool (p, H, W): logits above MASK_THRESHOLD.
    """
    square = F.interpolate(logits_p1hw, (image_size, image_size), mode="bilinear", align_corners=False)
    inside = square[..., : resized_size[0], : resized_size[1]]
    full = F.interpolate(inside, original_size, mode="bilinear", align_corners=False)
    return full[:, 0] > MASK_THRESHOLD


def mask_cover(
    logits_p1hw: Tensor, image_size: int, size: tuple[int, int], resized_size: tuple[int, int]
) -> Tensor:
    """Return the share of each pixel of a picture that a mask covers: a mask with smooth edges, for drawing.

    Each pixel is sampled SAMPLES x SAMPLES times; a sample is inside as in `upscale_masks`.

    Args:
        logits_p1hw: float32 (p, 1, 4g, 4g) over the encoder's square.
        image_size: side of the square in pixels.
        size: (height, width) in pixels of the picture, which shows the whole image.
        resized_size: (height, width) of the resized image on the square, in pixels.

    Returns:
        float32 (p, H, W), 0 to 1.
    """
    fine = size[0] * SAMPLES, size[1] * SAMPLES
    covers = [
        F.avg_pool2d(upscale_masks(one_1hw[None], image_size, fine, resized_size).float(), SAMPLES)
        for one_1hw in logits_p1hw
    ]
    return torch.cat(covers)
