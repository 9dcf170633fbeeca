"""int8 storage: one scale per image and channel, symmetric about zero."""

from __future__ import annotations

import numpy as np

LEVELS = 127


def quantize(emb_CHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round float32 (C, H, W) to int8 in [-127, 127] and float32 scales (C,), value = int8 x scale.

    The largest magnitude of a channel maps to 127 (clipping it instead is worse for SAM's embeddings); a channel
    that is zero throughout gets scale 0.
    """
    peak_C = np.abs(emb_CHW).max(axis=(1, 2))
    scales_C = (peak_C / np.float32(LEVELS)).astype(np.float32)
    divisor_C = np.where(scales_C > 0, scales_C, np.float32(1))
    steps_CHW = np.rint(emb_CHW / divisor_C[:, None, None])
    return np.clip(steps_CHW, -LEVELS, LEVELS).astype(np.int8), scales_C


def dequantize(values_NCHW: np.ndarray, scales_NC: np.ndarray) -> np.ndarray:
    """float32 (N, C, H, W) from int8 values and their scales (N, C)."""
    return values_NCHW.astype(np.float32) * scales_NC[:, :, None, None]
