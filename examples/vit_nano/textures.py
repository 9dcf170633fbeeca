"""Noise and textures of one material for generated scenes (scene.py).

Shape suffixes: H and W rows and columns, C red, green and blue, N colours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

from examples.generate_pictures import photo_texture

Floats = npt.NDArray[np.float32]
Rng = np.random.Generator

KINDS = {
    "fractal": 0.26,
    "plain": 0.16,
    "strokes": 0.13,
    "leaves": 0.15,
    "spots": 0.06,
    "stripes": 0.07,
    "tiles": 0.05,
    "photo": 0.12,
}
"""Kinds of textures, and how often each is drawn."""
SIZES = (0.005, 0.045)
"""Sizes of a texture's elements, as shares of the picture's longer side; drawn log-uniformly."""
MOST_ELEMENTS = 5000


def fractal(
    rng: Rng,
    height: int,
    width: int,
    cell: float,
    octaves: int = 4,
    rough: float = 0.55,
    stretch: float = 1.0,
) -> Floats:
    """Return fractal noise around 0.5, float32 (height, width) of 0 to 1.

    Args:
        rng: random generator.
        height, width: size in pixels.
        cell: size of the coarsest features, in pixels.
        octaves: number of scales, each half as large as the one before.
        rough: weight of a scale, relative to the coarser one before.
        stretch: width of features, in multiples of their height.
    """
    total_HW, weight = np.zeros((height, width), np.float32), 1.0
    for _ in range(octaves):
        total_HW += weight * _octave(rng, height, width, cell, stretch)
        weight, cell = weight * rough, cell / 2
        if cell < 1.5:
            break
    return np.clip((total_HW - total_HW.mean()) / (total_HW.std() + 1e-6) * 0.2 + 0.5, 0, 1)


def _octave(rng: Rng, height: int, width: int, cell: float, stretch: float) -> Floats:
    rows = min(height, int(np.ceil(height / max(1.0, cell))) + 2)
    columns = min(width, int(np.ceil(width / max(1.0, cell * stretch))) + 2)
    grid = rng.random((max(2, rows), max(2, columns)), np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def palette(rng: Rng, base_3: Floats | None = None, spread: float = 25.0, number: int = 4) -> Floats:
    """Return colours (number, 3) around one, 0 to 255: brightness varies most, hue little.

    Args:
        rng: random generator.
        base_3: their mean; None for any colour.
        spread: standard deviation of brightness.
        number: number of colours.
    """
    if base_3 is None:
        bright = rng.uniform(20, 235)
        base_3 = np.clip(bright + rng.normal(0, 35, 3) * rng.choice([0.3, 1.0, 1.5]), 5, 250)
    bright_N = rng.normal(0, spread, number)
    return np.clip(base_3 + bright_N[:, None] + rng.normal(0, spread * 0.35, (number, 3)), 0, 255).astype(
        np.float32
    )


def blended(colours_NC: Floats, mix_HW: Floats) -> Floats:
    """Return the colours (H, W, 3) of a gradient through several colours, at places 0 to 1."""
    place_HW = np.clip(mix_HW, 0, 1) * (len(colours_NC) - 1)
    low_HW = np.minimum(place_HW.astype(np.int32), len(colours_NC) - 2)
    rest_HW1 = (place_HW - low_HW)[..., None]
    return colours_NC[low_HW] * (1 - rest_HW1) + colours_NC[low_HW + 1] * rest_HW1


def texture(rng: Rng, height: int, width: int, side: int, base_3: Floats | None = None) -> Floats:
    """Draw a texture of one material, float32 (height, width, 3) of 0 to 255.

    Args:
        rng: random generator.
        height, width: size in pixels.
        side: longer side of the picture, to which sizes of elements are relative.
        base_3: mean colour; None for any.
    """
    kind = rng.choice(list(KINDS), p=list(KINDS.values()))
    colours_NC = palette(rng, base_3, float(np.exp(rng.uniform(np.log(6), np.log(50)))))
    size = float(np.exp(rng.uniform(*np.log(SIZES)))) * side
    if kind == "photo":
        found = photo_texture(rng, height, width, side)
        return found if base_3 is None else np.clip(found - found.mean((0, 1)) + base_3, 0, 255)
    if kind == "strokes":
        return _strokes(rng, height, width, size * 1.5, colours_NC)
    if kind == "leaves":
        return _leaves(rng, height, width, size, colours_NC)
    if kind == "plain":
        return blended(
            palette(rng, colours_NC[0], 7), fractal(rng, height, width, max(height, width) * 0.7, 2)
        )
    if kind in ("spots", "stripes"):
        return _pattern(rng, height, width, size, colours_NC, stripes=kind == "stripes")
    if kind == "tiles":
        return _tiles(rng, height, width, size, colours_NC)
    cell = float(np.exp(rng.uniform(np.log(1.0), np.log(8)))) * size
    stretch = float(np.exp(rng.normal(0, 0.7)))
    return blended(colours_NC, fractal(rng, height, width, cell, 5, rng.uniform(0.45, 0.85), stretch))


def _strokes(rng: Rng, height: int, width: int, size: float, colours_NC: Floats) -> Floats:
    """Draw grass, fur or hair: many short lines of about one direction."""
    image = Image.new("RGB", (width, height), tuple(int(value) for value in colours_NC[0]))
    draw = ImageDraw.Draw(image)
    number = int(min(MOST_ELEMENTS, 2.5 * height * width / max(4.0, size * 2)))
    starts = rng.uniform((-size, -size), (width + size, height + size), (number, 2))
    turns = rng.uniform(0, np.pi) + rng.normal(0, rng.uniform(0.1, 0.7), number)
    lengths = size * rng.uniform(0.5, 1.5, (number, 1))
    ends = starts + np.stack([np.cos(turns), np.sin(turns)], 1) * lengths
    shades = _shades(rng, colours_NC, number)
    for start, end, shade in zip(starts.tolist(), ends.tolist(), shades, strict=True):
        draw.line((*start, *end), tuple(shade), max(1, round(size / 9)))
    return np.asarray(image, dtype=np.float32)


def _leaves(rng: Rng, height: int, width: int, size: float, colours_NC: Floats) -> Floats:
    """Draw leaves, stones, flowers or a crowd: many small overlapping shapes."""
    image = Image.new("RGB", (width, height), tuple(int(value) for value in colours_NC[0] * 0.6))
    draw = ImageDraw.Draw(image)
    shape = draw.rectangle if rng.random() < 0.15 else draw.ellipse
    number = int(min(MOST_ELEMENTS, 3.5 * height * width / max(3.0, size * size)))
    places = rng.uniform((0, 0), (width, height), (number, 2))
    halves = size * np.exp(rng.normal(0, 0.4, (number, 2))) / 2
    shades = _shades(rng, colours_NC, number)
    for (x, y), (a, b), shade in zip(places.tolist(), halves.tolist(), shades, strict=True):
        shape((x - a, y - b, x + a, y + b), tuple(shade))
    return np.asarray(image, dtype=np.float32)


def _shades(rng: Rng, colours_NC: Floats, number: int) -> list[list[int]]:
    shades = colours_NC[rng.integers(len(colours_NC), size=number)] + rng.normal(0, 12, (number, 1))
    return np.clip(shades, 0, 255).astype(int).tolist()


def _pattern(rng: Rng, height: int, width: int, size: float, colours_NC: Floats, *, stripes: bool) -> Floats:
    warp_HW = fractal(rng, height, width, size * 4, 2)
    if stripes:
        y, x = np.mgrid[:height, :width].astype(np.float32)
        turn = rng.uniform(0, np.pi)
        wave_HW = np.sin((x * np.cos(turn) + y * np.sin(turn)) / size * 2 + warp_HW * rng.uniform(0, 8))
    else:
        wave_HW = (fractal(rng, height, width, size * 1.5, 2) - 0.5) * 6
    mix_HW = np.clip(wave_HW * rng.uniform(1, 5) / 2 + 0.5, 0, 1)
    return blended(colours_NC[:2], mix_HW) + (warp_HW[..., None] - 0.5) * 30


def _tiles(rng: Rng, height: int, width: int, size: float, colours_NC: Floats) -> Floats:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    wide, high = size * rng.uniform(1, 4), size * rng.uniform(1, 2)
    row_HW = np.floor(y / high)
    shifted_HW = x / wide + 0.5 * (row_HW % 2)
    tone_HW = np.sin(row_HW * 12.9898 + np.floor(shifted_HW) * 78.233) * 43758.5453
    found = blended(colours_NC[:3], tone_HW - np.floor(tone_HW))
    gap = rng.uniform(0.05, 0.2)
    found[((y / high) % 1 < gap) | (shifted_HW % 1 < gap * high / wide)] = colours_NC[3]
    return found


def ground(rng: Rng, height: int, width: int, side: int, horizon: float) -> Floats:
    """Draw a plane in perspective, float32 (height, width, 3) of 0 to 255: elements shrink towards the horizon.

    Args:
        rng: random generator.
        height, width: size in pixels.
        side: longer side of the picture.
        horizon: row of the horizon.
    """
    tile = texture(rng, 256, 256, 256)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    depth_HW = 1 / np.maximum((y - horizon + 0.04 * side) / side, 0.01)
    zoom = rng.uniform(20, 60)
    along_HW, across_HW = (depth_HW * zoom + 7) % 254, ((x / width - 0.5) * depth_HW * zoom + 31) % 254
    found = np.stack(
        [ndimage.map_coordinates(tile[..., c], (along_HW, across_HW), order=1) for c in range(3)], -1
    )
    fade_HW1 = np.clip((depth_HW - 4) / 20, 0, 0.9)[..., None]
    return found * (1 - fade_HW1) + tile.mean((0, 1)) * fade_HW1


def sky(rng: Rng, height: int, width: int, side: int) -> Floats:
    """Draw a sky with clouds, float32 (height, width, 3) of 0 to 255."""
    top_3 = np.array([rng.uniform(30, 190), rng.uniform(80, 200), rng.uniform(120, 245)], np.float32)
    if rng.random() < 0.35:
        top_3 = palette(rng, None, 10, 1)[0]
    low_3 = np.clip(top_3 + rng.uniform(-20, 90) + rng.normal(0, 20, 3), 0, 255).astype(np.float32)
    found = blended(
        np.stack([top_3, low_3]), np.broadcast_to(np.linspace(0, 1, height)[:, None], (height, width))
    )
    if rng.random() < 0.7:
        noise_HW = fractal(rng, height, width, side * rng.uniform(0.1, 0.5), 5, 0.6, rng.uniform(1, 4))
        cover_HW = np.clip((noise_HW - rng.uniform(0.4, 0.7)) * rng.uniform(2, 6), 0, 1) * rng.uniform(0.4, 1)
        cloud_3 = palette(rng, np.array([225, 225, 228], np.float32), 25, 1)[0]
        found = found + (cloud_3 - found) * cover_HW[..., None]
    return found.astype(np.float32)
