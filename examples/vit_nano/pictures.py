"""Generated pictures for training and validation of vit_nano (train.py)."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from examples.generate_pictures import generate
from mobilesam.distill.data.labels import mask_side, to_square_mask

SEED = 1
HELD_OUT_SEED = 2
# Number of pictures by size. They repeat turned and mirrored, with other objects and prompts.
PICTURES = {128: 8192, 256: 8192, 512: 1024, 1024: 256}
VALIDATION_PICTURES = 64


@dataclass(frozen=True)
class Sample:
    """Training sample: canvas_HWC uint8 (S, S, 3), size (height, width), segments_MM uint8, chosen object numbers.

    A segment of 0 is background, n is object n.
    """

    canvas_HWC: np.ndarray
    size: tuple[int, int]
    segments_MM: np.ndarray
    chosen: tuple[int, ...]


@dataclass(frozen=True)
class Pictures:
    """Arrays of N pictures: canvas_NHWC uint8, sizes_N2 int64 (height, width), segments_NMM uint8 as in a sample."""

    canvas_NHWC: np.ndarray
    sizes_N2: np.ndarray
    segments_NMM: np.ndarray

    def sample(self, index: int, objects: int, rng: np.random.Generator, turn: int = 0) -> Sample:
        """Return a picture in one of its eight orientations (`turn`), with up to `objects` random objects."""
        side, height, width = self.canvas_NHWC.shape[1], *self.sizes_N2[index].tolist()
        rows, columns = (round(length * mask_side(side) / side) for length in (height, width))
        pixels_HWC = _turned(self.canvas_NHWC[index, :height, :width], turn)
        inside = _turned(self.segments_NMM[index, :rows, :columns], turn)
        canvas_HWC = np.zeros((side, side, 3), np.uint8)
        canvas_HWC[: pixels_HWC.shape[0], : pixels_HWC.shape[1]] = pixels_HWC
        segments_MM = np.zeros((mask_side(side),) * 2, np.uint8)
        segments_MM[: inside.shape[0], : inside.shape[1]] = inside
        seen = np.flatnonzero(np.bincount(segments_MM.ravel())[1:]) + 1
        chosen = tuple(rng.permutation(seen)[:objects].tolist())
        return Sample(canvas_HWC, pixels_HWC.shape[:2], segments_MM, chosen)


def _shapes(number: int, side: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Return shapes and dtypes of the arrays of `number` pictures, in the order of Pictures."""
    masks = mask_side(side)
    return {
        "canvas": ((number, side, side, 3), np.uint8),
        "sizes": ((number, 2), np.int64),
        "segments": ((number, masks, masks), np.uint8),
    }


def training_pictures(folder: Path, side: int) -> Pictures:
    """Return the training pictures, made by all cores at the first call and kept in `folder`.

    Made during training they would take twice as long, since its threads wait for each other.
    """
    number, shapes = PICTURES[side], _shapes(PICTURES[side], side)
    kept = folder / f"pictures-{side}"
    if not kept.exists():
        draft = folder / f"draft-{side}"
        draft.mkdir(exist_ok=True)
        for name, (shape, dtype) in shapes.items():
            np.lib.format.open_memmap(draft / f"{name}.npy", "w+", dtype, shape).flush()
        step = -(-number // 64)
        with ProcessPoolExecutor() as pool:
            parts = [range(first, min(number, first + step)) for first in range(0, number, step)]
            list(pool.map(make_pictures, [draft] * len(parts), [side] * len(parts), parts))
        draft.rename(kept)
    return Pictures(*(np.load(kept / f"{name}.npy", "r") for name in shapes))


def make_pictures(folder: Path, side: int, indices: range) -> None:
    """Write some pictures into the arrays in `folder`; runs in a subprocess."""
    pictures = Pictures(*(np.load(folder / f"{name}.npy", "r+") for name in _shapes(0, side)))
    for index in indices:
        fill_in(pictures, index, SEED)


def fill_in(pictures: Pictures, index: int, seed: int) -> None:
    """Write picture number `index` of `seed` into the arrays."""
    side = pictures.canvas_NHWC.shape[1]
    picture = generate(seed, index, side)
    height, width = picture.pixels_HWC.shape[:2]
    pictures.canvas_NHWC[index, :height, :width] = picture.pixels_HWC
    pictures.sizes_N2[index] = height, width
    for number, mask in enumerate(picture.masks, 1):
        pictures.segments_NMM[index][to_square_mask(mask, mask_side(side))] = number


@cache
def held_out_pictures(side: int) -> Pictures:
    """Return the validation pictures, of another seed."""
    number = VALIDATION_PICTURES * 256 // side
    pictures = Pictures(*(np.zeros(shape, dtype) for shape, dtype in _shapes(number, side).values()))
    for index in range(number):
        fill_in(pictures, index, HELD_OUT_SEED)
    return pictures


def _turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    turned = np.rot90(pixels, turn % 4)
    return turned if turn < 4 else turned[:, ::-1]
