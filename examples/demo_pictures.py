"""Pictures for `make demo`: those that the student learns from, and others to judge it by.

    python examples/demo_pictures.py --out demo/pictures

`train` has generated pictures, and crops of nine of the photos in examples/photos. `held-out` has the other three
photos, crops of them, and generated pictures of another seed. No picture in `train` shows a part of those three, not
even as a texture. Pictures that exist are kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from generate_pictures import PHOTOS, photo_files
from generate_pictures import write as write_generated
from photo_crops import write_crops

SIDE = 256
HELD_OUT_PHOTOS = ("cat.png", "coffee.jpg", "raccoon.jpg")
TRAIN_SEED, HELD_OUT_SEED = 0, 2
GENERATED, CROPS = 1000, 1100
HELD_OUT_GENERATED, HELD_OUT_CROPS = 36, 21


def write_train(folder: Path, generated: int, crops: int, workers: int) -> None:
    """Write the pictures to train on.

    Args:
        folder: folder to write them to, generated ones and crops in a folder each.
        generated: number of generated pictures.
        crops: number of crops of photos.
        workers: number of processes.
    """
    photos = [path for path in photo_files(PHOTOS) if path.name not in HELD_OUT_PHOTOS]
    write_generated(folder / "generated", TRAIN_SEED, generated, SIDE, workers=workers, photos=photos)
    write_crops(photos, folder / "photos", crops, SIDE, TRAIN_SEED)


def write_held_out(folder: Path, generated: int, crops: int, workers: int) -> None:
    """Write the pictures to judge by; arguments as of write_train."""
    photos = [path for path in photo_files(PHOTOS) if path.name in HELD_OUT_PHOTOS]
    write_generated(folder / "generated", HELD_OUT_SEED, generated, SIDE, workers=workers, photos=photos)
    write_crops(photos, folder / "photos", crops, SIDE, HELD_OUT_SEED)
    for photo in photos:
        shutil.copyfile(photo, folder / "photos" / photo.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--generated", type=int, default=GENERATED, metavar="N")
    parser.add_argument("--crops", type=int, default=CROPS, metavar="N", help="crops of photos, 256 pixels")
    options = parser.parse_args()
    workers = len(os.sched_getaffinity(0))
    write_train(options.out / "train", options.generated, options.crops, workers)
    write_held_out(options.out / "held-out", HELD_OUT_GENERATED, HELD_OUT_CROPS, workers)
    held_out = HELD_OUT_GENERATED + HELD_OUT_CROPS + len(HELD_OUT_PHOTOS)
    print(
        f"{options.generated + options.crops:,} pictures to learn from, {held_out} held out, in {options.out}"
    )


if __name__ == "__main__":
    main()
