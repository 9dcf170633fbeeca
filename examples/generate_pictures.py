"""Write generated pictures with exact labels in SA-1B's layout: sa_1.jpg beside sa_1.json, and so on.

    python examples/generate_pictures.py --out generated --count 100 --seed 0 --side 1024

Each picture shows overlapping textured objects of very different sizes over a textured background. Textures are
parts of the photos in examples/photos and procedural noise; shapes are blobs, ellipses, polygons, boxes and rings.
A scene is described in units of its longer side, so the same seed gives the same scene at any size. Pictures of
different seeds have no scene in common: train on one seed, measure on another.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from pycocotools import mask as coco

PHOTOS = Path(__file__).parent / "photos"
ASPECTS = (1.0, 1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3)
OBJECTS = (5, 14)
DIAMETERS = (0.06, 0.6)
"""Diameters of objects, as shares of the picture's longer side; drawn log-uniformly."""
MIN_VISIBLE = 0.001
"""Share of the picture that must be visible of an object for it to be labelled."""
TALLEST_TEXTURE = 512
"""Height in pixels to which photos are reduced: sharp enough for textures."""
SUPERSAMPLING = 2

_paths: Sequence[Path] | None = None
"""Photos that textures are taken from, or None for those in PHOTOS."""

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Generated picture: uint8 RGB pixels, and bool (H, W) masks of the objects' visible parts.

    Masks are disjoint and in drawing order.
    """

    pixels_HWC: Pixels
    masks: list[Mask]


def generate(seed: int, index: int, side: int) -> Picture:
    """Generate picture number `index` of `seed`, its longer side `side` pixels; deterministic."""
    for attempt in count():
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index, attempt])))
        picture = _compose(rng, side)
        if len(picture.masks) >= OBJECTS[0]:
            return picture
    raise AssertionError("unreachable")


def _compose(rng: np.random.Generator, side: int) -> Picture:
    """Draw one scene; some of its objects may be hidden."""
    aspect = ASPECTS[rng.integers(len(ASPECTS))]
    width, height = (side, round(side / aspect)) if aspect >= 1 else (round(side * aspect), side)
    canvas_HWC = texture(rng, height, width, side).astype(np.float32)
    owner_HW = np.full((height, width), -1, np.int16)
    diameters = np.exp(rng.uniform(*np.log(DIAMETERS), size=rng.integers(*OBJECTS)))
    # Mostly large before small, or the small ones would be hidden; the noise sometimes swaps them.
    order = np.argsort(-diameters * np.exp(rng.normal(0, 0.4, len(diameters))))
    for number, diameter in enumerate(diameters[order]):
        _draw_object(rng, canvas_HWC, owner_HW, number, diameter * side, side)
    canvas_HWC = _light(rng, canvas_HWC)
    masks = [owner_HW == number for number in range(len(diameters))]
    least = max(9, MIN_VISIBLE * height * width)
    return Picture(
        pixels_HWC=np.clip(canvas_HWC + 0.5, 0, 255).astype(np.uint8),
        masks=[mask_HW for mask_HW in masks if np.count_nonzero(mask_HW) >= least],
    )


def _draw_object(
    rng: np.random.Generator,
    canvas_HWC: Floats,
    owner_HW: npt.NDArray[np.int16],
    number: int,
    diameter: float,
    side: int,
) -> None:
    """Draw one object over the canvas and assign its pixels to it."""
    height, width = owner_HW.shape
    centre = np.array([rng.uniform(0, width), rng.uniform(0, height)])
    outlines = [outline * (diameter / 2) + centre for outline in shape(rng)]
    points = outlines[0]
    left, top = np.maximum(np.floor(points.min(axis=0)).astype(int), 0)
    right, bottom = np.minimum(np.ceil(points.max(axis=0)).astype(int) + 1, (width, height))
    # Drawn before the check below, so that the random numbers used do not depend on rounding.
    drawn_HWC = texture(rng, max(1, bottom - top), max(1, right - left), side)
    shadow = rng.uniform(0.5, 1) if rng.random() < 0.3 else None
    if right <= left or bottom <= top:
        return
    alpha_HW = _raster(outlines, left, top, right - left, bottom - top)
    part_HWC = canvas_HWC[top:bottom, left:right]
    if shadow is not None:
        _cast_shadow(canvas_HWC, alpha_HW, left, top, max(1, round(0.012 * side)), shadow)
    part_HWC += (drawn_HWC - part_HWC) * alpha_HW[..., None]
    owner_HW[top:bottom, left:right][alpha_HW > 0.5] = number


def _cast_shadow(
    canvas_HWC: Floats, alpha_HW: Floats, left: int, top: int, offset: int, strength: float
) -> None:
    below_HWC = canvas_HWC[
        top + offset : top + offset + len(alpha_HW), left + offset : left + offset + alpha_HW.shape[1]
    ]
    cut_HW = alpha_HW[: below_HWC.shape[0], : below_HWC.shape[1]]
    below_HWC *= 1 - (1 - strength) * cut_HW[..., None]


def _raster(outlines: list[npt.NDArray[np.float64]], left: int, top: int, width: int, height: int) -> Floats:
    """Return the share of each pixel inside the first outline and outside the others, 0 to 1."""
    image = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    draw = ImageDraw.Draw(image)
    for i, outline in enumerate(outlines):
        corners = (outline - (left, top)) * SUPERSAMPLING - 0.5
        draw.polygon([(float(x), float(y)) for x, y in corners], fill=0 if i else 255)
    small = image.resize((width, height), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def shape(rng: np.random.Generator) -> list[npt.NDArray[np.float64]]:
    """Draw the outline of an object of diameter about 2 around (0, 0), and those of its holes: (N, 2) x and y."""
    kind = rng.choice(["blob", "ellipse", "polygon", "box", "ring"], p=[0.4, 0.2, 0.2, 0.15, 0.05])
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    radii = np.ones_like(angles)
    if kind == "blob":
        for wave in range(2, 7):
            radii += rng.normal(0, 0.45 / wave) * np.cos(wave * angles + rng.uniform(0, 2 * np.pi))
        radii = np.clip(radii, 0.3, 1.6)
    elif kind == "polygon":
        corners = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
        angles, radii = corners, rng.uniform(0.6, 1.1, len(corners))
    elif kind == "box":
        angles = np.pi * (np.array([0.25, 0.75, 1.25, 1.75]))
        radii = np.full(4, 1.1)
    outline = np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=-1)
    stretch = np.exp(rng.uniform(-0.45, 0.45))
    turn = rng.uniform(0, 2 * np.pi)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.diag(
        [stretch, 1 / stretch]
    )
    outlines = [outline] if kind != "ring" else [outline, outline * rng.uniform(0.35, 0.65)]
    return [points @ matrix.T for points in outlines]


def texture(rng: np.random.Generator, height: int, width: int, side: int) -> Floats:
    """Draw a texture for a picture of longer side `side` pixels: float32 (height, width, 3), 0 to 255."""
    kind = rng.choice(["photo", "noise", "stripes", "plain"], p=[0.4, 0.3, 0.15, 0.15])
    if kind == "photo":
        return photo_texture(rng, height, width, side)
    one_3, other_3 = _two_colours(rng)
    if kind == "noise":
        mix_HW = _noise(rng, height, width, side)
    elif kind == "stripes":
        mix_HW = _stripes(rng, height, width, side)
    else:
        mix_HW = np.full((height, width), 0.5, np.float32)
    return one_3 + (other_3 - one_3) * mix_HW[..., None]


def _two_colours(rng: np.random.Generator) -> tuple[Floats, Floats]:
    colour_3 = rng.uniform(15, 240, 3)
    other_3 = np.clip(colour_3 + rng.normal(0, 45, 3), 0, 255)
    return colour_3.astype(np.float32), other_3.astype(np.float32)


def photo_texture(rng: np.random.Generator, height: int, width: int, side: int) -> Floats:
    """Return a part of a photo in other colours, for a picture of longer side `side`: float32 (height, width, 3)."""
    photos = _photos()
    photo = photos[rng.integers(len(photos))]
    share = np.exp(rng.uniform(np.log(0.25), 0)) * max(height, width) / side
    cut_w, cut_h = (max(4, round(share * length)) for length in (photo.width, photo.height))
    x, y = (
        rng.integers(photo.width - min(cut_w, photo.width) + 1),
        rng.integers(photo.height - min(cut_h, photo.height) + 1),
    )
    box = (x, y, min(photo.width, x + cut_w), min(photo.height, y + cut_h))
    found = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR, box), dtype=np.float32)
    if rng.random() < 0.5:
        found = found[:, ::-1]
    # Change contrast and colour, so that there are more textures than photos.
    gain_3, shift_3 = rng.uniform(0.6, 1.2, 3), rng.normal(0, 30, 3)
    middle_3 = found.mean(axis=(0, 1))
    return np.clip((found - middle_3) * gain_3 + middle_3 + shift_3, 0, 255).astype(np.float32)


def _noise(rng: np.random.Generator, height: int, width: int, side: int) -> Floats:
    """Return smooth noise of two octaves, float32 (height, width), 0 to 1."""
    cell = np.exp(rng.uniform(np.log(0.01), np.log(0.15))) * side
    total_HW = np.zeros((height, width), np.float32)
    for octave, weight in ((1, 0.65), (2, 0.35)):
        rows, columns = (int(np.ceil(length * octave / cell)) + 2 for length in (height, width))
        # A generator of its own: the count of random numbers depends on the picture's size.
        grid = np.random.Generator(np.random.PCG64(rng.integers(2**63))).random(
            (min(rows, height), min(columns, width)), np.float32
        )
        image = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        total_HW += weight * np.asarray(image)
    return np.clip((total_HW - 0.5) * rng.uniform(1, 3) + 0.5, 0, 1).astype(np.float32)


def _stripes(rng: np.random.Generator, height: int, width: int, side: int) -> Floats:
    period = np.exp(rng.uniform(np.log(0.015), np.log(0.12))) * side
    turn, hard = rng.uniform(0, np.pi), rng.random() < 0.5
    y, x = np.ogrid[:height, :width]
    wave_HW = np.sin((x * np.cos(turn) + y * np.sin(turn)) * (2 * np.pi / period) + rng.uniform(0, 2 * np.pi))
    return np.clip(wave_HW * (4 if hard else 1) / 2 + 0.5, 0, 1).astype(np.float32)


def _light(rng: np.random.Generator, canvas_HWC: Floats) -> Floats:
    """Apply light that falls off to one side, and sensor noise."""
    height, width = canvas_HWC.shape[:2]
    slope_x, slope_y = rng.uniform(-0.2, 0.2, 2)
    y, x = np.ogrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    light_HW = (1 + slope_x * x + slope_y * y).astype(np.float32)
    grain = np.random.Generator(np.random.PCG64(rng.integers(2**63)))
    noise_HW = grain.standard_normal((height, width), np.float32) * np.float32(rng.uniform(0, 5))
    return canvas_HWC * light_HW[..., None] + noise_HW[..., None]


def use_photos(paths: Sequence[Path] | None) -> None:
    """Take textures from these photos from now on, in this process; None: from those in PHOTOS."""
    global _paths
    _paths = paths
    _photos.cache_clear()


def photo_files(folder: Path) -> list[Path]:
    """Return the photos of a folder, .jpg and .png, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in {".jpg", ".png"})


@cache
def _photos() -> list[Image.Image]:
    photos = []
    for path in photo_files(PHOTOS) if _paths is None else _paths:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        image.thumbnail((4 * TALLEST_TEXTURE, TALLEST_TEXTURE))
        photos.append(image)
    if not photos:
        raise SystemExit(f"no photos in {PHOTOS}: the textures are made of them")
    return photos


def annotations(picture: Picture, image_id: int) -> dict[str, object]:
    """Return the content of SA-1B's JSON file for a picture; boxes are x, y, width, height in pixels."""
    height, width = picture.pixels_HWC.shape[:2]
    return {
        "image": {"image_id": image_id, "width": width, "height": height, "file_name": f"sa_{image_id}.jpg"},
        "annotations": list(_annotations(picture)),
    }


def _annotations(picture: Picture) -> Iterator[dict[str, object]]:
    height, width = picture.pixels_HWC.shape[:2]
    for number, mask_HW in enumerate(picture.masks):
        rle = coco.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
        y, x = np.argwhere(mask_HW)[np.count_nonzero(mask_HW) // 2]
        yield {
            "id": number,
            "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
            "bbox": [float(value) for value in coco.toBbox(rle)],
            "area": int(coco.area(rle)),
            "predicted_iou": 1.0,
            "stability_score": 1.0,
            "crop_box": [0, 0, width, height],
            "point_coords": [[float(x), float(y)]],
        }


def write(
    folder: Path,
    seed: int,
    number: int,
    side: int,
    quality: int = 95,
    workers: int = 1,
    photos: Sequence[Path] | None = None,
) -> None:
    """Write pictures 1 to `number` of `seed` into `folder`, keeping those that exist.

    Files appear complete or not at all. The pictures do not depend on the number of processes, `workers`, but on the
    photos that textures are taken from (None: all in PHOTOS).
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [
        image_id
        for image_id in range(1, number + 1)
        if not all((folder / f"sa_{image_id}{ending}").exists() for ending in (".jpg", ".json"))
    ]
    write_one = partial(_write_one, folder, seed, side, quality)
    if workers == 1:
        use_photos(photos)
        try:
            for image_id in missing:
                write_one(image_id)
        finally:
            use_photos(None)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), use_photos, (photos,)) as processes:
        for _ in processes.map(write_one, missing, chunksize=16):
            pass


def _write_one(folder: Path, seed: int, side: int, quality: int, image_id: int) -> None:
    picture = generate(seed, image_id, side)
    draft = folder / f"{image_id}.draft"
    draft.write_text(json.dumps(annotations(picture, image_id)))
    draft.replace(folder / f"sa_{image_id}.json")
    Image.fromarray(picture.pixels_HWC).save(draft, format="JPEG", quality=quality)
    draft.replace(folder / f"sa_{image_id}.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--count", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--side", type=int, default=1024, metavar="PX", help="longer side of the pictures")
    options = parser.parse_args()
    if options.count < 1 or options.side < 64:
        parser.error("--count must be at least 1, --side at least 64")
    write(options.out, options.seed, options.count, options.side, workers=len(os.sched_getaffinity(0)))
    print(f"{options.count} pictures with their labels in {options.out}")


if __name__ == "__main__":
    main()
