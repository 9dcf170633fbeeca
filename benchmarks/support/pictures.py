"""Images of benchmarks: the example photos, and generated pictures.

Generated pictures all differ, because copies would stay on one side of distill's split.
"""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from mobilesam.sam import image_pixels, load_image

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"

PER_FOLDER = 1000
SA1B_HEIGHT, SA1B_WIDTH = 1500, 2250
"""Pixels of a typical photo of SA-1B."""

GRAIN = 4.0
"""Standard deviation of the noise on large photos, in grey levels: enlarged photos lack a camera's fine structure."""


def make_pictures(root: Path, count: int, side: int) -> Path:
    """Write `count` JPEGs of smooth noise in folders of a thousand below `root`; return `root`.

    They are `side` pixels wide, and from half of that to all of it high.
    """
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / f"{number // PER_FOLDER:04d}"
        if number % PER_FOLDER == 0:
            folder.mkdir(parents=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        height = int(rng.integers(side // 2, side + 1))
        coarse.resize((side, height)).save(folder / f"{number:08d}.jpg")
    return root


def make_large_photos(root: Path, count: int, height: int = SA1B_HEIGHT, width: int = SA1B_WIDTH) -> Path:
    """Write `count` JPEGs of quality 90 and of `height` x `width` pixels into `root`; return `root`.

    They are the example photos in turn, enlarged and cropped, with grain.
    """
    root.mkdir(parents=True)
    generator = np.random.default_rng(0)
    examples = sorted(path for path in PHOTOS.iterdir() if path.suffix in (".jpg", ".png"))
    for number, example in enumerate(islice(cycle(examples), count)):
        with Image.open(example) as photo:
            large = ImageOps.fit(photo.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
        grain = generator.standard_normal((height, width, 1), np.float32) * np.float32(GRAIN)
        pixels = np.clip(np.asarray(large) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{number:06d}.jpg", quality=90)
    return root


def photo_pixels(name: str, image_size: int) -> Tensor:
    """Return an example photo, preprocessed: float32 (1, 3, image_size, image_size)."""
    return image_pixels(load_image((PHOTOS / name).read_bytes(), image_size), image_size)
