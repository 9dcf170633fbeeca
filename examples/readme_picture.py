"""Draw the picture at the top of README.md: photos, the masks of the teacher for a point, and those of a student.

make demo
python examples/readme_picture.py --student demo/runs/latest --out docs/pictures/readme.jpg
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from segment_anything import SamPredictor

from mobilesam.predict import StudentPredictor, load_model, load_teacher_model
from mobilesam.sam import decode_image

PHOTOS = Path(__file__).parent / "photos"
POINTS: dict[str, tuple[int, int]] = {
    "coffee.jpg": (160, 250),
    "raccoon.jpg": (350, 300),
    "cat.png": (400, 250),
}
"""Point in each photo, in pixels."""

CELL, HEIGHT, GAP, MARGIN, HEAD = 400, 267, 12, 28, 84
"""Width and height of a photo, the space between two, the picture's margin, and the height of the headings."""
SCALE = 2
"""Pixels of the file for one of the page."""
BACKGROUND, INK, FAINT, MASK = (22, 27, 34), (240, 243, 246), (145, 152, 161), (56, 139, 253)
OPACITY = 0.55

Rgb = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Column:
    """Heading of a column, and the model that makes its masks."""

    title: str
    subtitle: str
    predictor: SamPredictor | None = None


def cropped(width: int, height: int) -> tuple[int, int, int, int]:
    """Return the middle of a photo in the shape of a cell: left, top, right, bottom in pixels."""
    wide, tall = min(width, height * CELL // HEIGHT), min(height, width * HEIGHT // CELL)
    left, top = (width - wide) // 2, (height - tall) // 2
    return left, top, left + wide, top + tall


def cell(image_HWC: Rgb, point: tuple[int, int], predictor: SamPredictor | None) -> Image.Image:
    """Return a photo at the size of a cell: with the point, or with the mask for it, smooth at its edge."""
    box = cropped(image_HWC.shape[1], image_HWC.shape[0])
    size = CELL * SCALE, HEIGHT * SCALE
    photo = Image.fromarray(image_HWC).resize(size, Image.Resampling.LANCZOS, box)
    scale = size[0] / (box[2] - box[0])
    x, y = ((place - start) * scale for place, start in zip(point, box[:2], strict=True))
    if predictor is not None:
        predictor.set_image(image_HWC)
        logits_THW, iou_T, _ = predictor.predict(np.array([point]), np.array([1]), return_logits=True)
        logits = Image.fromarray(logits_THW[iou_T.argmax()].astype(np.float32))
        logits_HW = np.asarray(logits.resize(size, Image.Resampling.BICUBIC, box))
        cover_HW = 0.5 + 0.5 * np.tanh(3 * logits_HW)
        photo_HWC = np.asarray(photo, dtype=np.float32)
        opacity_HW1 = (OPACITY * cover_HW)[..., None]
        photo = Image.fromarray(np.uint8(photo_HWC * (1 - opacity_HW1) + np.array(MASK) * opacity_HW1))
    dot = ImageDraw.Draw(photo)
    for radius, colour in ((7 * SCALE, "white"), (5 * SCALE, (0, 170, 60))):
        dot.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return photo


def draw(columns: list[Column], photos: dict[str, tuple[int, int]]) -> Image.Image:
    """Return the picture: a row for each photo."""
    width = 2 * MARGIN + len(columns) * CELL + (len(columns) - 1) * GAP
    height = 2 * MARGIN + HEAD + len(photos) * HEIGHT + (len(photos) - 1) * GAP
    canvas = Image.new("RGB", (width * SCALE, height * SCALE), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for number, column in enumerate(columns):
        left = (MARGIN + number * (CELL + GAP)) * SCALE
        pen.text((left, MARGIN * SCALE), column.title, INK, ImageFont.load_default(26 * SCALE))
        pen.text((left, (MARGIN + 38) * SCALE), column.subtitle, FAINT, ImageFont.load_default(16 * SCALE))
        for row, (name, point) in enumerate(photos.items()):
            image_HWC = decode_image((PHOTOS / name).read_bytes())
            top = (MARGIN + HEAD + row * (HEIGHT + GAP)) * SCALE
            canvas.paste(cell(image_HWC, point, column.predictor), (left, top))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", required=True, metavar="RUN", help="run of make demo")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jpg")
    options = parser.parse_args()
    student = load_model(options.student)
    teacher = load_teacher_model("vit_nano", image_size=student.sam.image_encoder.img_size)
    draw(
        [
            Column(title="photo", subtitle="one point"),
            Column(
                title="teacher",
                subtitle="here vit_nano; SAM's encoder has 637 M parameters",
                predictor=SamPredictor(teacher.sam),
            ),
            Column(
                title="student",
                subtitle="6 M parameters, trained for minutes",
                predictor=StudentPredictor(student.sam),
            ),
        ],
        POINTS,
    ).save(options.out, quality=75, optimize=True)


if __name__ == "__main__":
    main()
