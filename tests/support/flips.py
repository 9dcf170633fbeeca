"""Flipped bits in data, for tests of several rooms."""

from __future__ import annotations


def flipped(data: bytes, bit: int) -> bytes:
    """Return a copy of the data with one bit inverted."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
