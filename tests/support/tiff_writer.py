"""Uncompressed and deflated TIFFs of any layout, written by the book: Pillow can't write most of them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def write_tiff(
    bands_HWC: np.ndarray,
    *,
    photometric: int = 1,
    extra: Sequence[int] = (),
    planes: bool = False,
    deflate: bool = False,
    big: bool = False,
    tags: Mapping[int, int] | None = None,
) -> bytes:
    """Return a TIFF, in the byte order of the array's dtype.

    Args:
        bands_HWC: (H, W, C), any number of bands of unsigned, signed or floating numbers.
        photometric: 1 BlackIsZero, 2 RGB, and so on.
        extra: values of ExtraSamples; none: the tag is left out.
        planes: the bands lie one behind the other, not pixel by pixel.
        deflate: compress each strip.
        big: BigTIFF.
        tags: further tags, each with one SHORT.
    """
    height, width, count = bands_HWC.shape
    dtype = bands_HWC.dtype
    order = ">" if dtype.byteorder == ">" else "<"
    parts = [bands_HWC[..., band] for band in range(count)] if planes else [bands_HWC]
    strips = [np.ascontiguousarray(part).tobytes() for part in parts]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips

    def values(kind: str, *numbers: int) -> tuple[int, int, bytes]:
        return {"H": 3, "I": 4}[kind], len(numbers), struct.pack(f"{order}{len(numbers)}{kind}", *numbers)

    fields = {
        256: values("I", width),
        257: values("I", height),
        258: values("H", *[8 * dtype.itemsize] * count),
        259: values("H", 8 if deflate else 1),
        262: values("H", photometric),
        273: values("I", *[0] * len(strips)),
        277: values("H", count),
        278: values("I", height),
        279: values("I", *map(len, strips)),
        284: values("H", 2 if planes else 1),
        339: values("H", *[{"u": 1, "i": 2, "f": 3}[dtype.kind]] * count),
    }
    fields |= {tag: values("H", number) for tag, number in (tags or {}).items()}
    if extra:
        fields[338] = values("H", *extra)
    fields = dict(sorted(fields.items()))
    word, inline = ("Q", 8) if big else ("I", 4)
    header = struct.pack(f"{order}HHHQ", 43, 8, 0, 16) if big else struct.pack(f"{order}HI", 42, 8)
    header = (b"MM" if order == ">" else b"II") + header
    behind = len(header) + (8 if big else 2) + len(fields) * (20 if big else 12) + inline
    outside, at = {}, behind
    for tag, (_, _, raw) in fields.items():
        if len(raw) > inline:
            outside[tag], at = at, at + len(raw)
    places = [at + sum(map(len, strips[:number])) for number in range(len(strips))]
    fields[273] = values("I", *places)
    directory = struct.pack(f"{order}{'Q' if big else 'H'}", len(fields))
    for tag, (kind, number, raw) in fields.items():
        directory += struct.pack(f"{order}HH{word}", tag, kind, number)
        directory += struct.pack(order + word, outside[tag]) if tag in outside else raw.ljust(inline, b"\0")
    blobs = b"".join(raw for _, _, raw in fields.values() if len(raw) > inline)
    return header + directory + bytes(inline) + blobs + b"".join(strips)
