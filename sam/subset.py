"""Which images a fraction keeps: decided by each key alone."""

from __future__ import annotations

import hashlib


def in_fraction(key: str, fraction: float, seed: int) -> bool:
    """Whether `fraction` (0 < fraction <= 1) of the images, drawn with `seed`, holds the image `key`.

    The answer depends on the three arguments alone: the same on every machine, stable when images are added, and
    nested (what 0.1 keeps, 0.2 keeps too). Raises ValueError for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, not {fraction}")
    digest = hashlib.sha256(f"{seed}\0".encode() + key.encode("utf-8", "surrogateescape")).digest()
    # A power of two scales exactly and Python compares int with float exactly: fraction 1 keeps every key.
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64
