"""Small pictures for a soak: all different, since copies would stay on one side of distill's split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

PER_FOLDER = 1000


def make_pictures(root: Path, count: int, side: int) -> Path:
    """`count` JPEGs of smooth noise in folders of a thousand below `root`, `side` pixels wide, from half to all of it
    high. Returns `root`."""
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / f"{number // PER_FOLDER:04d}"
        if number % PER_FOLDER == 0:
            folder.mkdir(parents=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        height = int(rng.integers(side // 2, side + 1))
        coarse.resize((side, height)).save(folder / f"{number:08d}.jpg")
    return root
