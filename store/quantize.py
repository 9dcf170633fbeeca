"""int8 quantisation of stored embeddings: one scale per image and channel, symmetric about zero.

Shape suffixes: B images, C channels, H and W rows and columns of an embedding.
"""

from __future__ import annotations

import numpy as np

LEVELS = 127
"""Quantisation levels on either side of zero."""


def quantize(emb_CHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise one image's embedding to int8, so that value = int8 x scale.

    The largest magnitude of a channel maps to 127 (clipping it instead is worse for SAM's embeddings); a channel
    that is zero throughout gets scale 0.

    Args:
        emb_CHW: float32 (C, H, W), finite.

    Returns:
        int8 values (C, H, W) in [-127, 127], and float32 scales (C,).
    """
    peak_C = np.abs(emb_CHW).max(axis=(1, 2))
    scales_C = (peak_C / np.float32(LEVELS)).astype(np.float32)
    divisor_C = np.where(scales_C > 0, scales_C, np.float32(1))
    steps_CHW = np.rint(emb_CHW / divisor_C[:, None, None])
    return np.clip(steps_CHW, -LEVELS, LEVELS).astype(np.int8), scales_C


def dequantize(values_BCHW: np.ndarray, scales_BC: np.ndarray) -> np.ndarray:
    """Restore embeddings from int8.

    Args:
        values_BCHW: int8 (B, C, H, W).
        scales_BC: float32 (B, C).

    Returns:
        float32 (B, C, H, W).
    """
    return values_BCHW.astype(np.float32) * scales_BC[:, :, None, None]
