"""Scenes that resemble photographs, with the masks of wholes, of their parts, and of groups of wholes.

A scene has a background of stuff (sky, ridges, water, fields and floors in perspective, walls; or a photo with its
regions), and things made of parts. Textures are often stronger than the edges between objects; edges are sharp, soft
or hairy; light, shadows, haze, blur, grain and JPEG are applied. train.py's pictures lack these.

Shape suffixes: H and W rows and columns, C red, green and blue, L levels, N points.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage

from examples.vit_nano.textures import Floats, Rng, fractal, ground, palette, sky, texture
from examples.vit_nano.things import HAIRY, THINGS, Points, blob

Numbers = npt.NDArray[np.int32]
Pixels = npt.NDArray[np.uint8]

PART, WHOLE, GROUP = range(3)
"""Levels of the masks. At each the masks don't overlap; 0 is what no mask covers."""
ASPECTS = (1.0, 4 / 3, 3 / 2, 3 / 2, 3 / 4, 2 / 3)
REFERENCE = 512
"""Size at which widths of blurs and edges are given, in pixels of the longer side."""


@dataclass(frozen=True)
class Layered:
    """Picture with masks of three levels: uint8 RGB (H, W, 3), and numbers int32 (3, H, W), 0 where no mask is."""

    pixels_HWC: Pixels
    numbers_LHW: Numbers


@dataclass
class Canvas:
    """Scene in the making: colours float32 (H, W, 3) of 0 to 255, and numbers as in `Layered`."""

    colours_HWC: Floats
    numbers_LHW: Numbers
    light: tuple[float, float]
    """Direction (x, y) that light comes from."""
    used: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Highest number in use at each level."""

    @property
    def side(self) -> int:
        return max(self.colours_HWC.shape[:2])

    def new(self, level: int) -> int:
        """Return an unused number of a level."""
        self.used[level] += 1
        return self.used[level]

    def paint(
        self, alpha_HW: Floats, colours_HWC: Floats, corner: tuple[int, int], numbers: list[int]
    ) -> None:
        """Paint over the rectangle at a corner (x, y), and give its pixels a number of each level."""
        rows = slice(corner[1], corner[1] + alpha_HW.shape[0])
        columns = slice(corner[0], corner[0] + alpha_HW.shape[1])
        under_HWC = self.colours_HWC[rows, columns]
        under_HWC += (np.clip(colours_HWC, 0, 255) - under_HWC) * alpha_HW[..., None]
        for level, number in enumerate(numbers):
            self.numbers_LHW[level, rows, columns][alpha_HW > 0.5] = number

    def fill(
        self, points_N2: Points, group: int | None = None, soft: float = 0.7, *, flat: bool = False
    ) -> None:
        """Paint a polygon of stuff, a plane in perspective or a texture."""
        found = raster(points_N2, self, soft)
        if found is not None:
            alpha_HW, corner, rng = *found, self.rng
            drawn = (
                ground(rng, *alpha_HW.shape, self.side, 0.0)
                if flat
                else texture(rng, *alpha_HW.shape, self.side)
            )
            self.paint(alpha_HW, drawn, corner, [self.new(PART), self.new(WHOLE), group or self.new(GROUP)])

    rng: Rng = field(default_factory=np.random.default_rng)


def raster(
    points_N2: Points, canvas: Canvas, soft: float, hair: float = 0.0
) -> tuple[Floats, tuple[int, int]] | None:
    """Return the share of each pixel inside a polygon, over its rectangle, and the rectangle's corner (x, y).

    Args:
        points_N2: the polygon, x and y in pixels.
        canvas: scene that the polygon is cut off by.
        soft: standard deviation of the edge's blur in pixels.
        hair: size of hairs or leaves at the edge in pixels; 0 for none.

    Returns:
        None if the polygon is out of the picture.
    """
    height, width = canvas.colours_HWC.shape[:2]
    margin = 2 + int(3 * soft + hair)
    left, top = np.maximum(np.floor(points_N2.min(0)).astype(int) - margin, 0).tolist()
    right, bottom = np.minimum(np.ceil(points_N2.max(0)).astype(int) + margin, (width, height)).tolist()
    wide, high = right - left, bottom - top
    if wide < 2 or high < 2:
        return None
    image = Image.new("L", (wide * 2, high * 2))
    ImageDraw.Draw(image).polygon(((points_N2 - (left, top)) * 2 - 0.5).ravel().tolist(), fill=255)
    alpha_HW = np.asarray(image.resize((wide, high), Image.Resampling.BOX), dtype=np.float32) / 255
    if hair:
        noise_HW = fractal(canvas.rng, high, wide, max(2.0, hair * 1.2), 3) - 0.5
        near_HW = ndimage.gaussian_filter(alpha_HW, hair)
        alpha_HW = np.clip((near_HW + noise_HW * 0.9 - 0.5) * 4 + 0.5, 0, 1)
    if soft > 0.3:
        alpha_HW = ndimage.gaussian_filter(alpha_HW, soft)
    return alpha_HW, (left, top)


def _rounded(colours_HWC: Floats, alpha_HW: Floats, light: tuple[float, float], strength: float) -> Floats:
    """Apply light to a part as if it were round."""
    inside_HW = ndimage.distance_transform_edt(alpha_HW > 0.5).astype(np.float32)
    raised_HW = ndimage.gaussian_filter(np.sqrt(inside_HW), max(1.0, 0.06 * max(alpha_HW.shape)))
    down_HW, right_HW = np.gradient(raised_HW)
    tone_HW = -(right_HW * light[0] + down_HW * light[1])
    return colours_HWC * (1 + strength * tone_HW / (np.abs(tone_HW).max() + 1e-6))[..., None]


def _draw_thing(
    canvas: Canvas, make: object, place: tuple[float, float], size: float, group: int, blur: float
) -> None:
    """Draw one thing of about `size` pixels; its parts of one material are one mask."""
    rng, scale, (x, y) = canvas.rng, canvas.side / REFERENCE, place
    parts = make(rng, x, y, size)  # type: ignore[operator]
    whole, base_3 = canvas.new(WHOLE), palette(rng, None, 20, 1)[0]
    spread = rng.choice([25, 70])
    soft = max(blur, rng.choice([0.4, 0.7, 1.2, 2.0], p=[0.4, 0.3, 0.2, 0.1]) * scale)
    hair = rng.uniform(1, 8) * scale if make in HAIRY and rng.random() < 0.45 else 0.0
    strength = rng.uniform(0, 0.7)
    if rng.random() < 0.5:
        _shadow(canvas, (x - canvas.light[0] * size * 0.2, y + size * 0.5), size)
    materials: dict[int, tuple[int, Floats, int]] = {}
    for outline_N2, material in parts:
        found = raster(outline_N2, canvas, soft, hair)
        if found is None:
            continue
        alpha_HW, corner = found
        if material not in materials:
            colour_3 = np.clip(base_3 + rng.normal(0, spread, 3) * (material > 0), 0, 255).astype(np.float32)
            # Drawn from a seed of its own for each part, a material looks the same each time.
            materials[material] = int(rng.integers(2**62)), colour_3, canvas.new(PART)
        seed, colour_3, number = materials[material]
        drawn = texture(np.random.Generator(np.random.PCG64(seed)), *alpha_HW.shape, canvas.side, colour_3)
        drawn = _rounded(drawn, alpha_HW, canvas.light, strength)
        if blur > 0.8:
            drawn = ndimage.gaussian_filter(drawn, (blur, blur, 0))
        canvas.paint(alpha_HW, drawn, corner, [number, whole, group])


def _shadow(canvas: Canvas, place: tuple[float, float], size: float) -> None:
    rng = canvas.rng
    outline_N2 = blob(rng, place, size * rng.uniform(0.25, 0.6), size * rng.uniform(0.04, 0.12))
    found = raster(outline_N2, canvas, size * 0.03)
    if found is not None:
        alpha_HW, (left, top) = found
        under_HWC = canvas.colours_HWC[top : top + len(alpha_HW), left : left + alpha_HW.shape[1]]
        under_HWC *= 1 - rng.uniform(0.2, 0.6) * alpha_HW[..., None]


def _ridge(rng: Rng, width: int, base: float, amplitude: float, cell: float, rough: float) -> Floats:
    """Return the row of a ridge in each column, float32 (width,)."""
    return base - (fractal(rng, 4, width, max(4.0, cell), 6, rough)[1] - 0.5) * 2 * amplitude


def _landscape(canvas: Canvas) -> float:
    """Draw sky, ridges, bands of ground or water, and perhaps a road; return the horizon's row."""
    rng, side, (height, width) = canvas.rng, canvas.side, canvas.colours_HWC.shape[:2]
    horizon = height * rng.uniform(0.2, 0.75)
    drawn = sky(rng, height, width, side)
    canvas.paint(
        np.ones((height, width), np.float32), drawn, (0, 0), [canvas.new(level) for level in range(3)]
    )
    haze_3, rows_H1 = drawn[int(horizon) - 1].mean(0), np.arange(height, dtype=np.float32)[:, None]
    far, number = canvas.new(GROUP), int(rng.integers(0, 4))
    for i in range(number):
        base = horizon - side * rng.uniform(0.03, 0.25) * (1 - i / 3)
        line_W = _ridge(rng, width, base, side * rng.uniform(0.03, 0.18), side * rng.uniform(0.15, 0.8), 0.45)
        if rng.random() < 0.3:
            line_W = line_W + (fractal(rng, 4, width, side * 0.012, 2)[1] - 0.5) * side * 0.05
        relief_HW = fractal(rng, height, width, side * rng.uniform(0.03, 0.15), 5, 0.6)
        haze = rng.uniform(0, 0.8) * (1 - i / number)
        drawn = (
            texture(rng, height, width, side) * (0.7 + 0.6 * relief_HW[..., None]) * (1 - haze)
            + haze_3 * haze
        )
        canvas.paint(
            np.clip(rows_H1 - line_W + 0.5, 0, 1), drawn, (0, 0), [canvas.new(PART), canvas.new(WHOLE), far]
        )
    near = canvas.new(GROUP)
    edges = np.sort(rng.uniform(horizon, height, rng.integers(1, 4)))
    edges[0] = horizon
    for edge in edges.tolist():
        line_W = _ridge(
            rng, width, edge, side * rng.choice([0.002, 0.02, 0.06]), side * rng.uniform(0.1, 1), 0.5
        )
        if rng.random() < 0.4:
            line_W = line_W + (fractal(rng, 4, width, side * 0.01, 2)[1] - 0.5) * side * rng.uniform(
                0.01, 0.06
            )
        kind = rng.choice(["ground", "water", "texture"], p=[0.5, 0.25, 0.25])
        if kind == "water":
            drawn = _water(canvas, edge)
        elif kind == "ground":
            drawn = ground(rng, height, width, side, edge)
        else:
            drawn = texture(rng, height, width, side)
        canvas.paint(
            np.clip(rows_H1 - line_W + 0.5, 0, 1), drawn, (0, 0), [canvas.new(PART), canvas.new(WHOLE), near]
        )
    if rng.random() < 0.35:
        near_x, far_x = np.sort(rng.uniform(0, width, 2)), rng.uniform(0.3, 0.7) * width
        canvas.fill(
            np.array(
                [
                    (far_x - 2, horizon),
                    (far_x + 2, horizon),
                    (near_x[1] + width * 0.1, height),
                    (near_x[0], height),
                ]
            ),
            near,
        )
    return horizon


def _water(canvas: Canvas, edge: float) -> Floats:
    """Return what is above a row, mirrored and rippled."""
    rng, side, (height, width) = canvas.rng, canvas.side, canvas.colours_HWC.shape[:2]
    mirrored = canvas.colours_HWC[np.clip(2 * int(edge) - np.arange(height), 0, height - 1)]
    mirrored = ndimage.gaussian_filter(mirrored, (side * 0.01, side * 0.004, 0)) * rng.uniform(0.5, 0.95)
    ripple_HW = fractal(rng, height, width, side * rng.uniform(0.005, 0.03), 3, 0.6, rng.uniform(2, 6)) - 0.5
    own_3 = palette(rng, np.array([60, 90, 110], np.float32), 15, 1)[0] * 0.25
    return mirrored + own_3 + ripple_HW[..., None] * rng.uniform(10, 120)


def _room(canvas: Canvas) -> float:
    """Draw a wall, which may be blurred, perhaps another, and perhaps a floor; return the floor's row."""
    rng, side, (height, width) = canvas.rng, canvas.side, canvas.colours_HWC.shape[:2]
    blur, drawn = rng.choice([0, 0, 2, 5, 10]) * side / REFERENCE, texture(rng, height, width, side)
    if blur:
        drawn = ndimage.gaussian_filter(drawn, (blur, blur, 0))
    group = canvas.new(GROUP)
    canvas.paint(
        np.ones((height, width), np.float32), drawn, (0, 0), [canvas.new(PART), canvas.new(WHOLE), group]
    )
    edge, tilt = height * rng.uniform(0.35, 0.9), rng.normal(0, 0.06) * height
    right, low = width + 5, height + 5
    if rng.random() < 0.4:
        corner = width * rng.uniform(0.15, 0.85)
        foot = corner + rng.normal(0, 0.03) * width
        canvas.fill(np.array([(corner, -5), (right, -5), (right, low), (foot, low)]), group)
    if rng.random() < 0.6:
        outline_N2 = np.array([(-5, edge - tilt), (right, edge + tilt), (right, low), (-5, low)])
        canvas.fill(outline_N2, None, rng.choice([0.7, 3.0]), flat=bool(rng.random() < 0.6))
    return edge


def _things(canvas: Canvas, edge: float, number: int) -> None:
    """Draw things, small before large, that stand on what is below a row."""
    rng, (height, width) = canvas.rng, canvas.colours_HWC.shape[:2]
    largest = np.exp(rng.uniform(np.log(0.2), np.log(0.95)))
    sizes = np.sort(largest * np.exp(-np.abs(rng.normal(0, 0.6, number)))) * canvas.side
    makes, chances = list(THINGS), list(THINGS.values())
    kinds = rng.choice(len(makes), number, p=chances)
    if rng.random() < 0.4:
        kinds[:] = kinds[0]
    together = canvas.new(GROUP) if rng.random() < 0.5 else None
    blur = rng.choice([0, 0, 0, 1.5, 3]) * canvas.side / REFERENCE
    first = number - 1 if rng.random() < 0.3 else 0
    for i in range(first, number):
        foot = min(height * 1.05, edge + rng.uniform(-0.1, 1) * (height - edge))
        place = rng.uniform(0.05, 0.95) * width, foot - sizes[i] * rng.uniform(0.1, 0.5)
        group = together or canvas.new(GROUP)
        _draw_thing(canvas, makes[kinds[i]], place, float(sizes[i]), group, blur * (i < number / 2))


def _photographed(canvas: Canvas) -> Pixels:
    """Return the scene's pixels with uneven light, a colour cast, blur, grain and JPEG's errors."""
    rng, side, (height, width) = canvas.rng, canvas.side, canvas.colours_HWC.shape[:2]
    colours = canvas.colours_HWC
    if rng.random() < 0.5:
        light_HW = 1 + (fractal(rng, height, width, side * rng.uniform(0.15, 0.8), 2) - 0.5) * rng.uniform(
            0.2, 1.6
        )
        if rng.random() < 0.3:
            shade = rng.uniform(0.4, 0.7)
            light_HW = ndimage.gaussian_filter(np.where(light_HW > 1, 1, shade), side * 0.004)
        colours = colours * light_HW[..., None]
    colours = ((colours - 128) * rng.uniform(0.6, 1.25) + 128 + rng.normal(0, 18)) * (
        1 + rng.normal(0, 0.07, 3)
    )
    if rng.random() < 0.08:
        colours = np.repeat(colours.mean(2, keepdims=True), 3, 2)
    blur = rng.choice([0, 0.5, 0.8, 1.3, 2.0], p=[0.3, 0.25, 0.2, 0.15, 0.1]) * side / REFERENCE
    if blur:
        colours = ndimage.gaussian_filter(colours, (blur, blur, 0))
    colours = colours + rng.standard_normal((height, width, 1)) * rng.choice([0.5, 2, 5, 9])
    image = Image.fromarray(np.clip(colours + 0.5, 0, 255).astype(np.uint8))
    if rng.random() < 0.6:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(35, 95)))
        image = Image.open(buffer).convert("RGB")
    return np.asarray(image)


def scene(seed: int, index: int, side: int) -> Layered:
    """Draw picture number `index` of `seed`, its longer side `side` pixels; deterministic."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index, 1])))
    aspect = ASPECTS[rng.integers(len(ASPECTS))]
    width, height = (side, round(side / aspect)) if aspect >= 1 else (round(side * aspect), side)
    colours, numbers = np.zeros((height, width, 3), np.float32), np.zeros((3, height, width), np.int32)
    turn = rng.uniform(0, 2 * np.pi)
    canvas = Canvas(colours, numbers, (float(np.cos(turn)), -float(abs(np.sin(turn)))), rng=rng)
    outdoors = rng.random() < 0.55
    edge = _landscape(canvas) if outdoors else _room(canvas)
    _things(canvas, edge, int(rng.integers(1, 9) if outdoors else rng.integers(2, 11)))
    return Layered(_photographed(canvas), canvas.numbers_LHW)


def things_on(background: Layered, seed: int, index: int) -> Layered:
    """Draw a few things over a picture, whose masks they cover; deterministic."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index, 2])))
    used = [int(level.max()) for level in background.numbers_LHW]
    canvas = Canvas(
        background.pixels_HWC.astype(np.float32), background.numbers_LHW.copy(), (0.6, -0.8), used, rng=rng
    )
    _things(canvas, len(background.pixels_HWC) * rng.uniform(0, 0.6), int(rng.integers(1, 5)))
    return Layered(_photographed(canvas), canvas.numbers_LHW)
