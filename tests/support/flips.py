"""Damaging files, as tests of several rooms do it."""

from __future__ import annotations


def flipped(data: bytes, bit: int) -> bytes:
    """The data with one bit of it inverted."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
