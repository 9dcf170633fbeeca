"""Speed on one core, and exactness, of JPEG decoders followed by a resize."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.support.figures import by_turns
from mobilesam.sam import load_image, resize_longest_side, resized_size


def full(data: bytes, image_size: int) -> np.ndarray:
    """Decode in full with Pillow, then resize, as precompute and distill do."""
    return load_image(data, image_size).pixels_HWC


def draft(data: bytes, image_size: int) -> np.ndarray:
    """Decode in Pillow's draft mode: libjpeg scales by 1/2, 1/4 or 1/8, as long as the result is large enough."""
    with Image.open(io.BytesIO(data)) as image:
        height, width = resized_size(image.height, image.width, image_size)
        image.draft("RGB", (width, height))
        return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))


def simplejpeg(data: bytes, image_size: int) -> np.ndarray:
    """Decode with libjpeg-turbo through simplejpeg, exact transform and upsampling, then resize likewise."""
    from simplejpeg import decode_jpeg

    return resize_longest_side(decode_jpeg(data, fastdct=False, fastupsample=False), image_size)


def compare_decoders(photos: Sequence[Path], image_size: int, rounds: int) -> list[str]:
    """Return one line for each decoder: images a second on one core, and the difference from the full decode.

    Args:
        photos: JPEG files.
        image_size: longer side after the resize, in pixels.
        rounds: timed passes, of which the median is taken.

    Returns:
        Lines of text; the difference is the mean absolute one, in grey levels.
    """
    ways: dict[str, Callable[[bytes, int], np.ndarray]] = {"Pillow, full": full, "Pillow, draft": draft}
    if find_spec("simplejpeg"):
        ways["simplejpeg, exact"] = simplejpeg
    files = [photo.read_bytes() for photo in photos]

    def decode_all(way: Callable[[bytes, int], np.ndarray]) -> None:
        for data in files:
            way(data, image_size)

    calls = {name: partial(decode_all, way) for name, way in ways.items()}
    seconds = by_turns(calls, rounds, clock=time.thread_time)
    wanted = [full(data, image_size) for data in files]
    lines = []
    for name, way in ways.items():
        off = np.mean(
            [
                np.abs(way(data, image_size) - pixels.astype(np.int16)).mean()
                for data, pixels in zip(files, wanted, strict=True)
            ]
        )
        rate = len(files) / seconds[name]
        lines.append(
            f"JPEG by {name}: {rate:.3g} images/s per core, {off:.2g} grey levels from the full decode"
        )
    if "simplejpeg, exact" not in ways:
        lines.append("simplejpeg is not installed: pip install 'mobilesam[bench]'")
    return lines
