"""Pictures of two flat polygons each over stripes, with their outlines in a COCO file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64


def write_shapes(folder: Path, count: int, seed: int) -> Path:
    """Write `count` pictures of 64 x 64 pixels to a new folder, and FOLDER.json with their outlines.

    Returns:
        Path of the COCO file.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir()
    y, x = np.mgrid[:SIDE, :SIDE]
    images, objects = [], []
    for number in range(count):
        stripes = [
            rng.integers(0, 256) + 30 * np.sin(x / rng.uniform(3, 9) + y / rng.uniform(3, 9))
            for _ in range(3)
        ]
        picture = Image.fromarray(np.clip(np.stack(stripes, -1), 0, 255).astype(np.uint8))
        images.append({"id": number, "file_name": f"{number:03}.png", "width": SIDE, "height": SIDE})
        for place in (0.27, 0.73):
            centre, radius = (SIDE * place, SIDE * rng.uniform(0.3, 0.7)), SIDE * rng.uniform(0.12, 0.22)
            angles = rng.uniform(0, 6.28) + 2 * np.pi * np.arange(sides := rng.integers(3, 9)) / sides
            corners = np.stack(
                [centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)], -1
            ).round(1)
            ImageDraw.Draw(picture).polygon(
                list(map(tuple, corners)), fill=tuple(rng.integers(0, 256, 3).tolist())
            )
            outline = [corners.ravel().tolist()]
            objects.append({"id": len(objects), "image_id": number, "iscrowd": 0, "segmentation": outline})
        picture.save(folder / f"{number:03}.png")
    path = folder.with_suffix(".json")
    path.write_text(json.dumps({"images": images, "annotations": objects}))
    return path
