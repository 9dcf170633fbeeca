"""Pictures that the page offers to try it on: photos that the user names, else a drawn one.

Photos are encoded anew, without the place and the camera that a phone writes into them: the folder may be published.

Shape suffixes: H, W rows and columns of an image, C channels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from ....common.errors import ImageError, shown
from ....sam import decode_image, read_image

LONGEST = 1600
"""Longest side of an example in pixels: more is a long download for no better mask."""

QUALITY = 90
"""JPEG quality of the examples."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """Picture of the page."""

    data: bytes
    """JPEG file."""
    size: tuple[int, int]
    """Width and height in pixels."""
    text: str
    """Description for people who don't see it."""


def read_examples(files: Sequence[Path]) -> list[Example]:
    """Read the photos that the page offers; a drawn picture if there are none.

    Args:
        files: photos in any format that `segment` reads.

    Raises:
        ImageError: a file is missing or no photo.
    """
    if not files:
        return [_encoded(_drawn(), "a drawn table with a mug, a ball and a book")]
    return [_encoded(Image.fromarray(_read(file)), file.stem) for file in files]


def _read(file: Path) -> npt.NDArray[np.uint8]:
    try:
        if not file.is_file():
            raise ImageError("there is no such file")
        return decode_image(read_image("", str(file)))
    except ImageError as error:
        raise ImageError(f"--examples {shown(str(file))}: {error}") from error


def _encoded(picture: Image.Image, text: str) -> Example:
    picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return Example(data=buffer.getvalue(), size=picture.size, text=text)


def _drawn() -> Image.Image:
    """Draw a table with a mug, a ball and a book before a wall, 960 x 640, with shadows and some grain."""
    width, height, fine = 960, 640, 2
    picture = Image.new("RGB", (width * fine, height * fine), (196, 205, 204))
    draw = ImageDraw.Draw(picture)

    def scaled(*numbers: float) -> list[float]:
        return [number * fine for number in numbers]

    draw.rectangle(scaled(0, 380, width, height), fill=(150, 108, 74))  # the table
    for line in range(400, height, 44):
        draw.line(scaled(0, line, width, line + 6), fill=(138, 97, 64), width=3 * fine)
    shadows = Image.new("L", picture.size)
    shade = ImageDraw.Draw(shadows)
    for box in ((110, 470, 360, 530), (400, 500, 640, 560), (640, 455, 930, 520)):
        shade.ellipse(scaled(*box), fill=130)
    picture.paste((60, 38, 24), mask=shadows.filter(ImageFilter.GaussianBlur(14 * fine)))
    # A mug, its ear behind it.
    draw.ellipse(scaled(270, 300, 370, 430), outline=(28, 84, 140), width=20 * fine)
    draw.rounded_rectangle(scaled(120, 250, 310, 505), radius=34 * fine, fill=(36, 104, 168))
    draw.rectangle(scaled(140, 270, 160, 480), fill=(86, 148, 204))
    draw.ellipse(scaled(120, 228, 310, 284), fill=(24, 72, 122))
    draw.ellipse(scaled(136, 238, 294, 276), fill=(62, 38, 26))
    # A ball with a stripe.
    draw.ellipse(scaled(420, 330, 620, 530), fill=(205, 62, 50))
    draw.chord(scaled(420, 330, 620, 530), 195, 345, fill=(214, 84, 70))
    draw.ellipse(scaled(470, 360, 510, 392), fill=(240, 160, 146))
    # A book, its pages and its cover.
    draw.polygon(scaled(660, 410, 880, 390, 925, 470, 700, 500), fill=(52, 118, 74))
    draw.polygon(scaled(700, 500, 925, 470, 925, 492, 702, 524), fill=(238, 232, 214))
    draw.polygon(scaled(660, 410, 700, 500, 702, 524, 660, 434), fill=(38, 90, 56))
    draw.line(scaled(702, 432, 852, 418), fill=(226, 214, 160), width=7 * fine)
    small = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    grain_HWC = np.random.default_rng(0).normal(0, 3, (height, width, 1))
    return Image.fromarray((small + grain_HWC).clip(0, 255).astype(np.uint8))
