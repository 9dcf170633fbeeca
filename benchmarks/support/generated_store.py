"""Students compared on generated pictures that vit_nano has embedded: stores, training, judgement.

Pictures of two seeds have no scene in common: students are trained on those of one and judged by those of the other.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilesam.distill import DistillConfig
from mobilesam.precompute import PrecomputeConfig, precompute
from mobilesam.verify import SweepConfig, sweep

SCRIPT = Path(__file__).parents[2] / "examples" / "generate_pictures.py"
DOCUMENT = Path(__file__).parents[2] / "docs" / "RECIPE.md"
TRAIN_SEED, TEST_SEED = 201, 202


def make_generated_store(folder: Path, name: str, *, count: int, seed: int, image_size: int) -> Path:
    """Generate pictures and embed them with vit_nano; only what is missing is made.

    Args:
        folder: folder of the pictures and of the store.
        name: name of the store, NAME.zarr.
        count: number of pictures.
        seed: seed of the pictures.
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


def compare_students(
    folder: Path,
    name: str,
    base: DistillConfig,
    axes: Mapping[str, tuple[Any, ...]],
    steps: Sequence[int],
    *,
    image_size: int,
    pictures: int,
    test_pictures: int,
) -> tuple[Path, list[Mapping[str, Any]]]:
    """Train a student for each combination of the axes' values and numbers of steps; a rerun resumes.

    The program ends if a training fails; the lines on standard error say why.

    Args:
        folder: folder of pictures and stores, which several comparisons may share.
        name: name of the comparison's folder of runs in it.
        base: options that all trainings share, except for the store.
        axes: values of options of distill, by name.
        steps: numbers of optimizer steps.
        image_size: longer side of the pictures, and side of the encoder's square, in pixels.
        pictures: number of pictures to train on.
        test_pictures: number of pictures to judge by.

    Returns:
        The store of the pictures trained on, and the outcomes as `sweep` returns them.
    """
    # One picture is held out, as distill needs.
    train, test = (
        make_generated_store(folder, f"{part}-{image_size}", count=count, seed=seed, image_size=image_size)
        for part, count, seed in (("train", pictures + 1, TRAIN_SEED), ("test", test_pictures, TEST_SEED))
    )
    result = sweep(
        SweepConfig(
            out=folder / name,
            base=replace(base, store=train, val_fraction=0.5 / pictures),
            axes=axes,
            iterations=tuple(steps),
            test_store=test,
        ),
        message=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if result["failed"]:
        sys.exit(f"{result['failed']} runs failed; the lines above say why")
    return train, result["runs"]
