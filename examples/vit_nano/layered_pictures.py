"""Pictures with masks of three levels for the last stages of vit_nano's training (train.py).

Shape suffixes: S side of the square, M side of the masks compared, L levels, H and W rows and columns, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from examples.generate_pictures import generate
from examples.vit_nano.photo_regions import part_of_photo
from examples.vit_nano.scene import Layered, scene, things_on
from mobilesam.distill.data.labels import mask_side

SEED = 1
SIDE = 512
"""Longer side of the pictures that are kept; they are enlarged or reduced to the image size of a step."""
KINDS = {"scene": 2000, "photo": 2000, "mixed": 800, "plain": 600, "large": 200}
"""Number of pictures of each kind: scenes, parts of photos with their regions, those with things on them, and
pictures of generate_pictures.py, of SIDE pixels and of twice that."""
CHANCES = {"scene": 0.28, "photo": 0.4, "mixed": 0.15, "plain": 0.17}
"""Share of each kind in the samples. In squares of more than SIDE pixels, large ones take the place of plain ones."""
LEVEL_CHANCES = (0.45, 0.35, 0.2)
PLAIN = ("plain", "large")
"""Kinds whose pictures have no natural orientation, and small objects."""
LEAST_SHARE, LEAST_PLAIN_SHARE = 0.003, 0.001
"""Share of the picture that an object must have to be prompted for, in natural and in plain pictures."""
INNERMOST = 0.6
"""Share of the prompts at an object's innermost point; the others are anywhere in it."""

Numbers = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Square:
    """Training sample: canvas_SSC uint8, size (height, width), levels_LMM uint8 numbers of objects, 0 for none."""

    canvas_SSC: npt.NDArray[np.uint8]
    size: tuple[int, int]
    levels_LMM: Numbers
    least: float
    """Least share of the picture of an object to prompt for."""


@dataclass(frozen=True)
class Prompt:
    """Object to prompt for: its level and number, and a point in it, x and y in pixels of the masks."""

    level: int
    number: int
    x: int
    y: int


def make(folder: Path, kind: str, workers: int) -> list[Path]:
    """Write the pictures of a kind that are missing, and return the paths of all.

    Args:
        folder: the training's.
        kind: one of KINDS.
        workers: number of processes.
    """
    paths = [folder / kind / f"{index}.npz" for index in range(KINDS[kind])]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    write = partial(_write, folder, kind)
    if workers == 1:
        for index in missing:
            write(index)
    elif missing:
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(write, missing, chunksize=16))
    return paths


def _write(folder: Path, kind: str, index: int) -> None:
    """Write one picture; its file appears complete or not at all."""
    picture = _MAKERS[kind](folder, index)
    height, width = picture.pixels_HWC.shape[:2]
    least = max(9, 0.001 * height * width)
    levels = np.stack([_few(numbers_HW, least) for numbers_HW in picture.numbers_LHW])
    path = folder / kind / f"{index}.npz"
    with path.with_suffix(".draft").open("wb") as draft:
        np.savez_compressed(draft, pixels=picture.pixels_HWC, levels=levels)
    path.with_suffix(".draft").replace(path)


def _few(numbers_HW: npt.NDArray[np.int32], least: float) -> Numbers:
    """Number the objects of at least so many pixels 1, 2 and so on, the largest first, at most 254."""
    values, which, counts = np.unique(numbers_HW, return_inverse=True, return_counts=True)
    order = [i for i in np.argsort(-counts, kind="stable") if values[i] > 0 and counts[i] >= least][:254]
    new = np.zeros(len(values), np.uint8)
    new[order] = np.arange(1, len(order) + 1)
    return new[which].reshape(numbers_HW.shape)


def _plain(index: int, side: int) -> Layered:
    picture = generate(SEED, index, side)
    numbers_HW = np.zeros(picture.pixels_HWC.shape[:2], np.int32)
    for number, mask_HW in enumerate(picture.masks, 1):
        numbers_HW[mask_HW] = number
    return Layered(picture.pixels_HWC, np.stack([numbers_HW] * 3))


def _photo(folder: Path, index: int, seed: int = SEED) -> Layered:
    return part_of_photo(folder / "photos", seed, index, SIDE)


_MAKERS: dict[str, Callable[[Path, int], Layered]] = {
    "scene": lambda _, index: scene(SEED, index, SIDE),
    "photo": _photo,
    "mixed": lambda folder, index: things_on(_photo(folder, index, SEED + 1000), SEED, index),
    "plain": lambda _, index: _plain(index, SIDE),
    "large": lambda _, index: _plain(index, 2 * SIDE),
}


def square(path: Path, side: int, rng: np.random.Generator) -> Square:
    """Read a picture, and vary it: cut, mirror, blur as by enlarging, and change contrast and colours.

    Args:
        path: file as written by `make`.
        side: side of the encoder's square in pixels, S.
        rng: random generator.
    """
    with np.load(path) as file:
        pixels_HWC, levels_LHW = file["pixels"], file["levels"]
    natural = path.parent.name not in PLAIN
    height, width = pixels_HWC.shape[:2]
    share = np.exp(rng.uniform(np.log(0.6), 0)) if natural and rng.random() < 0.5 else 1.0
    x, y = rng.uniform(0, 1 - share, 2) if share < 1 else (0.0, 0.0)
    box = (x * width, y * height, (x + share) * width, (y + share) * height)
    scale = side / max(height, width)
    wide, high = max(16, round(width * scale)), max(16, round(height * scale))
    image = Image.fromarray(pixels_HWC)
    if natural and side >= SIDE and rng.random() < 0.5:
        coarse = rng.uniform(1, 2.2)
        image = image.resize((round(wide / coarse), round(high / coarse)), Image.Resampling.BILINEAR, box)
        box = None
    pixels_HWC = np.asarray(image.resize((wide, high), Image.Resampling.BILINEAR, box))
    masks = mask_side(side)
    rows, columns = max(4, round(high * masks / side)), max(4, round(wide * masks / side))
    at_y = ((y + (np.arange(rows) + 0.5) / rows * share) * height).astype(int)
    at_x = ((x + (np.arange(columns) + 0.5) / columns * share) * width).astype(int)
    levels_LHW = levels_LHW[:, at_y[:, None], at_x]
    turn = int(rng.integers(8)) if not natural else 4 * int(rng.integers(2))
    pixels_HWC, levels_LHW = np.rot90(pixels_HWC, turn % 4), np.rot90(levels_LHW, turn % 4, (1, 2))
    if turn >= 4:
        pixels_HWC, levels_LHW = pixels_HWC[:, ::-1], levels_LHW[:, :, ::-1]
    if natural and rng.random() < 0.6:
        pixels_HWC = _recoloured(pixels_HWC, rng)
    canvas_SSC, levels_LMM = np.zeros((side, side, 3), np.uint8), np.zeros((3, masks, masks), np.uint8)
    canvas_SSC[: pixels_HWC.shape[0], : pixels_HWC.shape[1]] = pixels_HWC
    levels_LMM[:, : levels_LHW.shape[1], : levels_LHW.shape[2]] = levels_LHW
    least = LEAST_SHARE if natural else LEAST_PLAIN_SHARE
    return Square(canvas_SSC, pixels_HWC.shape[:2], levels_LMM, least)


def _recoloured(pixels_HWC: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    found = pixels_HWC.astype(np.float32)
    found = (found - found.mean()) * rng.uniform(0.7, 1.3) + found.mean() + rng.normal(0, 15)
    found = found * (1 + rng.normal(0, 0.06, 3))
    if rng.random() < 0.06:
        found = found.mean(2, keepdims=True).repeat(3, 2)
    return np.clip(found, 0, 255).astype(np.uint8)


def draw_prompts(sample: Square, count: int, rng: np.random.Generator) -> list[Prompt]:
    """Draw up to `count` different objects of any level, and a point in each."""
    side = len(sample.canvas_SSC)
    area = sample.size[0] * sample.size[1] * (sample.levels_LMM.shape[1] / side) ** 2
    pixels = [np.bincount(level_MM.ravel(), minlength=256)[1:] for level_MM in sample.levels_LMM]
    chosen: dict[tuple[int, int], Prompt] = {}
    for level in rng.choice(3, 3 * count, p=LEVEL_CHANCES).tolist():
        large = np.flatnonzero(pixels[level] >= sample.least * area) + 1
        number = int(rng.choice(large)) if len(large) else 0
        if number and (level, number) not in chosen and len(chosen) < count:
            chosen[level, number] = Prompt(level, number, *_point(sample.levels_LMM[level] == number, rng))
    return list(chosen.values())


def _point(mask_MM: npt.NDArray[np.bool_], rng: np.random.Generator) -> tuple[int, int]:
    """Return x and y of a mask's innermost pixel, or of any."""
    if rng.random() < INNERMOST:
        y, x = divmod(int(ndimage.distance_transform_edt(np.pad(mask_MM, 1)).argmax()), mask_MM.shape[1] + 2)
        return x - 1, y - 1
    y, x = divmod(int(rng.choice(np.flatnonzero(mask_MM))), mask_MM.shape[1])
    return x, y
