"""Write photos and human segmentations of BSDS500 in SA-1B's layout, for `mobilesam evaluate --images`.

    git clone https://github.com/BIDS/BSDS500
    python -m examples.vit_nano.bsds_labels --bsds BSDS500/BSDS500/data --split test --out bsds
    mobilesam evaluate --images bsds --teacher vit_nano --model nano=vit_nano

Several people segmented every photo; this uses the person with the median number of segments. Segments smaller than
--min-share of the photo are left out. Needs scipy.
BSDS500 (Arbelaez et al., TPAMI 2011) may be used for research and teaching only: do not redistribute it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.io import loadmat

from examples.generate_pictures import Picture, annotations


def segments(path: Path) -> npt.NDArray[np.uint16]:
    """Return each pixel's segment number, uint16 (H, W), by the person with the median number of segments."""
    people = loadmat(path, squeeze_me=True, struct_as_record=False)["groundTruth"]
    found = sorted((person.Segmentation for person in np.atleast_1d(people)), key=lambda each: each.max())
    return found[len(found) // 2]


def write(bsds: Path, split: str, out: Path, min_share: float) -> tuple[int, int]:
    """Write sa_1.jpg, sa_1.json and so on; return the numbers of photos and segments."""
    photos = sorted((bsds / "images" / split).glob("*.jpg"), key=lambda path: int(path.stem))
    if not photos:
        raise SystemExit(f"no photos in {bsds / 'images' / split}: --bsds is BSDS500's folder 'data'")
    out.mkdir(parents=True, exist_ok=True)
    written = 0
    for image_id, photo in enumerate(photos, 1):
        numbers_HW = segments(bsds / "groundTruth" / split / f"{photo.stem}.mat")
        masks = [numbers_HW == number for number in np.unique(numbers_HW)]
        masks = [mask_HW for mask_HW in masks if mask_HW.mean() >= min_share]
        with Image.open(photo) as image:
            picture = Picture(pixels_HWC=np.asarray(image.convert("RGB")), masks=masks)
        (out / f"sa_{image_id}.json").write_text(json.dumps(annotations(picture, image_id)))
        shutil.copyfile(photo, out / f"sa_{image_id}.jpg")
        written += len(masks)
    return len(photos), written


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bsds", type=Path, required=True, metavar="DIR")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--min-share", type=float, default=0.005, metavar="X")
    options = parser.parse_args()
    photos, written = write(options.bsds, options.split, options.out, options.min_share)
    print(f"{photos} photos with {written} segments in {options.out}")


if __name__ == "__main__":
    main()
