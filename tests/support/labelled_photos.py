"""Labels of photos in SA-1B's JSON: ellipses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco


def labelled_masks(size: tuple[int, int], seed: int) -> list[np.ndarray]:
    """Return the masks of three ellipses, bool (H, W)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    masks = []
    for _ in range(3):
        cy, cx = rng.uniform(0.3, 0.7, 2) * size
        ry, rx = rng.uniform(0.1, 0.3, 2) * size
        masks.append(((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1)
    return masks


def annotation(mask_HW: np.ndarray) -> dict[str, Any]:
    """Return SA-1B's annotation of a mask: run lengths and box (x, y, width, height)."""
    runs = coco.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    box = [float(number) for number in coco.toBbox(runs)]
    return {"segmentation": {"size": list(mask_HW.shape), "counts": runs["counts"].decode()}, "bbox": box}


def label(photo: Path, seed: int) -> None:
    """Write SA-1B's JSON beside a photo."""
    with Image.open(photo) as image:
        width, height = image.size
    content = {
        "image": {"image_id": seed, "width": width, "height": height, "file_name": photo.name},
        "annotations": [annotation(mask_HW) for mask_HW in labelled_masks((height, width), seed)],
    }
    photo.with_suffix(".json").write_text(json.dumps(content))
