"""Masks that SAM's head gives for points, from embeddings that are already there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .head import SamHead

MASK_THRESHOLD = 0.0

PROMPTS_AT_ONCE = {"cpu": 4, "cuda": 32}
"""In the decoder. On a CPU 16 at once take twice as long as four times 4, whose tensors fit its caches better."""

PIXELS_AT_ONCE = 2**24
"""Of logits at an image's full size: 64 MiB. A larger image has its masks one by one."""


def point_masks(
    head: SamHead,
    emb_1CHW: Tensor,
    points_N2: npt.NDArray[np.floating],
    original_size: tuple[int, int],
    resized_size: tuple[int, int],
) -> Tensor:
    """The mask for each of N points, each a prompt by itself: what SamPredictor.predict_torch gives for them.

    Args:
        head: in evaluation mode, on the embedding's device.
        emb_1CHW: float32 (1, 256, g, g), the image's embedding.
        points_N2: x and y in pixels of the original image, all of them foreground.
        original_size: height and width of the image.
        resized_size: height and width of its part of the encoder's square.

    Returns:
        bool (N, H, W) at the original size, on the embedding's device: SAM's single mask for each point, logits
        above 0. Computed in float32, whatever autocast is on.
    """
    chunks = mask_chunks([(head, emb_1CHW)], points_N2, original_size, resized_size)
    return torch.cat([masks_nHW for (masks_nHW,) in chunks])


@torch.no_grad()
def mask_chunks(
    pairs: Sequence[tuple[SamHead, Tensor]],
    points_N2: npt.NDArray[np.floating],
    original_size: tuple[int, int],
    resized_size: tuple[int, int],
) -> Iterator[list[Tensor]]:
    """`point_masks` of several embeddings of one image, each with its head, a few points at a time, so that memory is
    bounded.

    Yields one bool (n, H, W) for each pair, for the same n points, in order. A chunk and what it is made of take
    about 4 bytes a pixel and 1 for each pair, for PIXELS_AT_ONCE or one image, whichever is more.
    """
    device_type = pairs[0][1].device.type
    prompts = PROMPTS_AT_ONCE[device_type]
    at_once = max(1, PIXELS_AT_ONCE // (original_size[0] * original_size[1]))
    with torch.autocast(device_type, enabled=False):
        for start in range(0, len(points_N2), prompts):
            points_n2 = points_N2[start : start + prompts]
            logits = [
                _low_res_logits(head, emb, points_n2, original_size, resized_size) for head, emb in pairs
            ]
            size = pairs[0][0].image_size
            for parts in zip(*(logits_n1hw.split(at_once) for logits_n1hw in logits), strict=True):
                yield [upscale_masks(part, size, original_size, resized_size) for part in parts]


def _low_res_logits(
    head: SamHead,
    emb_1CHW: Tensor,
    points_n2: npt.NDArray[np.floating],
    original_size: tuple[int, int],
    resized_size: tuple[int, int],
) -> Tensor:
    """Logits (n, 1, 4g, 4g) over the encoder's whole square."""
    coords_n12 = to_square(points_n2, original_size, resized_size).to(emb_1CHW.device)[:, None]
    labels_n1 = torch.ones(len(coords_n12), 1, dtype=torch.int, device=emb_1CHW.device)
    sparse, dense = head.prompt_encoder(points=(coords_n12, labels_n1), boxes=None, masks=None)
    logits_n1hw, _ = head.mask_decoder(
        # Equal embeddings must give equal masks, whatever layout an encoder left them in.
        image_embeddings=emb_1CHW.float().contiguous(),
        image_pe=head.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    return logits_n1hw


def to_square(
    points: npt.NDArray[np.floating], original_size: tuple[int, int], resized_size: tuple[int, int]
) -> Tensor:
    """Points (..., 2), x and y in pixels of an image of `original_size`, in those of the encoder's square, float32.

    In float64 until then, as ResizeLongestSide.apply_coords does it.
    """
    scale_2 = np.array([resized_size[1] / original_size[1], resized_size[0] / original_size[0]])
    return torch.as_tensor(points * scale_2, dtype=torch.float32)


def upscale_masks(
    logits_n1hw: Tensor, image_size: int, original_size: tuple[int, int], resized_size: tuple[int, int]
) -> Tensor:
    """Masks at the original size, bool (n, H, W), in the two steps of Sam.postprocess_masks."""
    square = F.interpolate(logits_n1hw, (image_size, image_size), mode="bilinear", align_corners=False)
    inside = square[..., : resized_size[0], : resized_size[1]]
    full = F.interpolate(inside, original_size, mode="bilinear", align_corners=False)
    return full[:, 0] > MASK_THRESHOLD
