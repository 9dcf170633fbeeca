"""Stores of generated pictures, embedded by vit_nano."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mobilesam.precompute import PrecomputeConfig, precompute

SCRIPT = Path(__file__).parents[2] / "examples" / "generate_pictures.py"


def make_generated_store(folder: Path, name: str, *, count: int, seed: int, image_size: int) -> Path:
    """Generate pictures and embed them with vit_nano; only what is missing is made.

    Args:
        folder: folder of the pictures and of the store.
        name: name of the store, NAME.zarr.
        count: number of pictures.
        seed: seed of the pictures; those of two seeds have no scene in common.
        image_size: longer side of the pictures, and side of the encoder's square, in pixels.

    Returns:
        The store's path.
    """
    pictures, store = folder / f"pictures-{name}", folder / f"{name}.zarr"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(SCRIPT), "--out", str(pictures), "--seed", str(seed)]
    subprocess.run(
        [*command, "--side", str(image_size), "--count", str(count)], check=True, stdout=subprocess.DEVNULL
    )
    config = PrecomputeConfig(images=(pictures,), out=store, teacher="vit_nano", image_size=image_size)
    result = precompute(config)
    if result["failed"]:
        raise RuntimeError(f"{result['failed']} of {count} pictures in {pictures} could not be embedded")
    return store
