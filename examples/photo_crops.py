"""Random crops of photos, with which a student of a few photos and many generated pictures learns real textures, too.

    python examples/photo_crops.py --photos examples/photos --out crops --count 500 --side 256

Crop I of a folder depends on its photos, `--seed` and I alone. It is a rectangle of a quarter to all of the photo's
shorter side, anywhere in it, mirrored or not, and saved with its longer side at most `--side` pixels; crops are never
enlarged. A crop holds what its photo holds: hold out whole photos for testing, not crops.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from generate_pictures import photo_files
from PIL import Image, ImageOps

SMALLEST, LONGEST_ASPECT = 0.25, 4 / 3


def random_crop(photo: Image.Image, side: int, generator: np.random.Generator) -> Image.Image:
    """Return a random part of a photo, its longer side `side` pixels or less."""
    height = min(photo.size) * generator.uniform(SMALLEST, 1)
    aspect = LONGEST_ASPECT ** generator.uniform(-1, 1)
    size = np.minimum((height * aspect**0.5, height / aspect**0.5), photo.size)
    left, top = generator.uniform(0, photo.size - size)
    crop = photo.crop(tuple(int(value) for value in (left, top, left + size[0], top + size[1])))
    crop.thumbnail((side, side), Image.Resampling.LANCZOS)
    return ImageOps.mirror(crop) if generator.random() < 0.5 else crop


def write_crops(photos: Sequence[Path], out: Path, count: int, side: int, seed: int) -> None:
    """Write `count` crops as PNG files, from each photo equally many or one more, keeping those that exist."""
    out.mkdir(parents=True, exist_ok=True)
    opened = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in photos]
    for number in range(count):
        which = number % len(photos)
        path = out / f"{photos[which].stem}-{number:05}.png"
        if not path.exists():
            crop = random_crop(opened[which], side, np.random.default_rng((seed, number)))
            crop.save(path.with_suffix(".draft"), format="PNG")
            path.with_suffix(".draft").replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, nargs="+", required=True, help="photos, or folders of them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    photos = [photo for path in options.photos for photo in (photo_files(path) if path.is_dir() else [path])]
    if not photos:
        parser.error(f"no .jpg or .png in {', '.join(map(str, options.photos))}")
    write_crops(photos, options.out, options.count, options.side, options.seed)


if __name__ == "__main__":
    main()
