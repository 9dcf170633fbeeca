"""Things made of parts, for generated scenes (scene.py): outlines of animals, people, plants and more.

A function returns a thing's parts in the order in which they are drawn: each part's outline, (N, 2) x and y in
pixels, and the number of its material; parts of one material look alike.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from examples.generate_pictures import shape

Points = npt.NDArray[np.float64]
Part = tuple[Points, int]
Rng = np.random.Generator


def blob(
    rng: Rng, centre: tuple[float, float], wide: float, high: float, turn: float = 0.0, rough: float = 0.12
) -> Points:
    """Return the outline of a lumpy ellipse.

    Args:
        rng: random generator.
        centre: x and y of its centre.
        wide, high: half axes in pixels.
        turn: angle in radians.
        rough: size of its lumps, as a share of the radius.
    """
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    radii = np.ones_like(angles)
    for wave in range(2, 6):
        radii += rng.normal(0, rough / wave * 2) * np.cos(wave * angles + rng.uniform(0, 2 * np.pi))
    radii = np.clip(radii, 0.4, 1.6)
    x, y = np.cos(angles) * radii * wide, np.sin(angles) * radii * high
    return np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], 1) + centre


def limb(
    start: tuple[float, float], end: tuple[float, float], thick: float, thin: float, bend: float = 0.0
) -> Points:
    """Return the outline of a tapering limb, bent to one side by a share of its length."""
    first, along = np.array(start), np.array(end) - start
    length = float(np.hypot(*along))
    across = np.array([-along[1], along[0]]) / (length + 1e-6)
    t = np.linspace(0, 1, 10)[:, None]
    middle = first + along * t + across * length * bend * np.sin(np.pi * t)
    half = across * (thick + (thin - thick) * t) / 2
    return np.concatenate([middle + half, (middle - half)[::-1]])


def animal(rng: Rng, x: float, y: float, size: float) -> list[Part]:
    """Return legs, tail, body, belly, neck, head, muzzle and ears."""
    way = rng.choice([-1, 1])
    wide, high = size * rng.uniform(0.3, 0.5), size * rng.uniform(0.14, 0.3)
    low = high * 0.5 + size * rng.uniform(0.05, 0.45)
    parts: list[Part] = []
    if rng.random() < 0.7:
        for place in (-0.75, -0.6, 0.55, 0.75)[: rng.integers(2, 5)]:
            foot = (x + place * wide + rng.normal(0, 0.05) * size, y + low)
            leg = limb((x + place * wide * 0.8, y), foot, high * 0.45, high * 0.2, rng.normal(0, 0.06))
            parts.append((leg, int(rng.random() < 0.2)))
    if rng.random() < 0.7:
        tail = (x - way * wide * rng.uniform(1.1, 1.9), y + rng.uniform(-1.2, 1) * high)
        parts.append((limb((x - way * wide * 0.8, y), tail, high * 0.35, high * 0.08, rng.normal(0, 0.2)), 0))
    parts.append((blob(rng, (x, y), wide, high, rng.normal(0, 0.2)), 0))
    if rng.random() < 0.3:
        parts.append((blob(rng, (x, y + high * 0.4), wide * 0.7, high * 0.5), 2))
    head_x, head_y = x + way * wide * rng.uniform(0.9, 1.3), y - high * rng.uniform(0.1, 1.8)
    neck = limb((x + way * wide * 0.75, y - high * 0.1), (head_x, head_y), high * 0.9, high * 0.55)
    head = high * rng.uniform(0.45, 0.75)
    muzzle = blob(rng, (head_x + way * head * 0.9, head_y + head * 0.25), head * 0.55, head * 0.4)
    parts.append((neck, 0))
    parts.append(
        (blob(rng, (head_x, head_y), head * 1.15, head, rng.normal(0, 0.3)), int(rng.random() < 0.4))
    )
    parts.append((muzzle, int(rng.integers(3))))
    if rng.random() < 0.5:
        for ear in (-0.4, 0.3):
            tip = (head_x + ear * head, head_y - head * rng.uniform(1.2, 2))
            root = (head_x + ear * head * 0.6, head_y - head * 0.5)
            parts.append((limb(root, tip, head * 0.5, head * 0.1), 1))
    return parts


def person(rng: Rng, x: float, y: float, size: float) -> list[Part]:
    """Return legs or a skirt, arms, torso, neck, hair and face."""
    head, top = size * rng.uniform(0.06, 0.09), y - size / 2
    shoulder, hip = size * rng.uniform(0.1, 0.16), size * rng.uniform(0.08, 0.14)
    chest, waist, feet = top + head * 2.2, top + size * rng.uniform(0.45, 0.55), y + size / 2
    parts: list[Part] = []
    if rng.random() < 0.75:
        for way in (-1, 1):
            foot = (x + way * hip * rng.uniform(0.2, 1.5), feet)
            leg = limb(
                (x + way * hip * 0.5, waist - head * 0.3), foot, hip * 0.95, hip * 0.55, rng.normal(0, 0.04)
            )
            parts.append((leg, 2))
    else:
        skirt = [
            (x - hip, waist - head),
            (x + hip, waist - head),
            (x + hip * 1.9, feet),
            (x - hip * 1.9, feet),
        ]
        parts.append((np.array(skirt), 2))
    for way in (-1, 1):
        hand = (x + way * shoulder * rng.uniform(0.6, 2.4), waist - rng.uniform(-0.1, 0.3) * size)
        elbow = (x + way * shoulder * 0.85, chest + head * 0.4)
        parts.append(
            (limb(elbow, hand, head * 0.9, head * 0.5, rng.normal(0, 0.12)), int(rng.random() < 0.7))
        )
    torso = np.array([(x - shoulder, chest), (x + shoulder, chest), (x + hip, waist), (x - hip, waist)])
    parts.append((torso + rng.normal(0, head * 0.15, (4, 2)), 1))
    parts.append((limb((x, chest + head * 0.3), (x, top + head), head * 0.9, head * 0.9), 0))
    parts.append((blob(rng, (x, top + head), head * 1.15, head * 1.3, rough=0.06), 3))
    face = (x + rng.normal(0, 0.2) * head, top + head * 1.25)
    parts.append((blob(rng, face, head * 0.85, head, rough=0.04), 0))
    return parts


def plant(rng: Rng, x: float, y: float, size: float) -> list[Part]:
    """Return a trunk and a crown of several clumps."""
    top = (x + rng.normal(0, 0.05) * size, y - size * 0.2)
    trunk = limb((x, y + size / 2), top, size * rng.uniform(0.03, 0.1), size * 0.03, rng.normal(0, 0.05))
    parts: list[Part] = [(trunk, 1)]
    for _ in range(rng.integers(1, 6)):
        centre = (x + rng.normal(0, 0.15) * size, y - size * rng.uniform(0.05, 0.4))
        wide, high = size * rng.uniform(0.12, 0.32), size * rng.uniform(0.1, 0.28)
        parts.append((blob(rng, centre, wide, high, rough=0.3), 0))
    return parts


def flower(rng: Rng, x: float, y: float, size: float) -> list[Part]:
    """Return a stalk, petals and a centre."""
    root = (x + rng.normal(0, 0.2) * size, y + size)
    parts: list[Part] = [(limb(root, (x, y), size * 0.06, size * 0.05, rng.normal(0, 0.1)), 2)]
    start, number = rng.uniform(0, 2 * np.pi), rng.integers(4, 10)
    for turn in start + np.arange(number) * 2 * np.pi / number:
        centre = (x + np.cos(turn) * size * 0.3, y + np.sin(turn) * size * 0.3)
        parts.append((blob(rng, centre, size * 0.28, size * rng.uniform(0.1, 0.2), turn), 0))
    parts.append((blob(rng, (x, y), size * 0.14, size * 0.14), 1))
    return parts


def building(rng: Rng, x: float, y: float, size: float) -> list[Part]:
    """Return the front, a side in perspective, a roof and windows."""
    wide, high = size * rng.uniform(0.25, 0.6), size * rng.uniform(0.3, 1.0)
    skew, deep = rng.uniform(0, 0.15) * size, size * rng.uniform(0, 0.35)
    left, right, top, low = x - wide / 2, x + wide / 2, y + size / 2 - high, y + size / 2
    parts: list[Part] = [(np.array([(left, top), (right, top), (right, low), (left, low)]), 0)]
    if deep > size * 0.08:
        far = right + deep
        parts.append((np.array([(right, top), (far, top + skew), (far, low - skew * 0.6), (right, low)]), 3))
    if rng.random() < 0.6:
        peak, ridge = top - size * rng.uniform(0.08, 0.3), wide * rng.uniform(-0.5, 0.5, 2)
        eaves = wide * 0.06
        roof = [(left - eaves, top), (right + eaves, top), (x + ridge.max(), peak), (x + ridge.min(), peak)]
        parts.append((np.array(roof), 1))
    rows, columns = rng.integers(0, 6), rng.integers(1, 6)
    for row in range(rows):
        for column in range(columns):
            a, b = left + wide * (column + 0.25) / columns, top + high * (row + 0.25) / (rows + 0.5)
            w, h = wide * 0.5 / columns, high * 0.5 / (rows + 0.5)
            parts.append((np.array([(a, b), (a + w, b), (a + w, b + h), (a, b + h)]), 2))
    return parts


def vessel(rng: Rng, x: float, y: float, size: float) -> list[Part]:
    """Return a vase, a band around it and its opening."""
    t = np.linspace(0, 1, 24)
    bulge = 0.12 + rng.uniform(0.05, 0.3) * np.sin(np.pi * t ** rng.uniform(0.6, 1.6))
    half = size * (bulge + rng.uniform(-0.05, 0.05) * t)
    left, right = (np.stack([x + way * half, y - size / 2 + size * t], 1) for way in (-1, 1))
    parts: list[Part] = [(np.concatenate([left, right[::-1]]), 0)]
    first, last = sorted(rng.integers(0, 24, 2).tolist())
    if last - first > 2 and rng.random() < 0.6:
        parts.append((np.concatenate([left[first:last], right[first:last][::-1]]), 1))
    if rng.random() < 0.5:
        parts.append((blob(rng, (x, y - size / 2), half[0], half[0] * 0.3, rough=0.02), 2))
    return parts


def lump(rng: Rng, x: float, y: float, size: float) -> list[Part]:
    """Return any shape of generate_pictures.py, with smaller ones on it."""
    parts: list[Part] = [(shape(rng)[0] * size / 2 + (x, y), 0)]
    for _ in range(rng.integers(0, 3)):
        centre = (x + rng.normal(0, 0.12) * size, y + rng.normal(0, 0.12) * size)
        parts.append((shape(rng)[0] * size * rng.uniform(0.08, 0.22) + centre, int(rng.integers(1, 3))))
    return parts


THINGS: dict[Callable[[Rng, float, float, float], list[Part]], float] = {
    animal: 0.27,
    person: 0.16,
    plant: 0.13,
    flower: 0.06,
    building: 0.13,
    vessel: 0.08,
    lump: 0.17,
}
"""Kinds of things, and how often each is drawn."""
HAIRY = (animal, plant, lump)
"""Kinds whose edges may be hairy or leafy."""
