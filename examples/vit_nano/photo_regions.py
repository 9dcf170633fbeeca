"""Regions of colour and texture in photographs, as masks of three levels: parts, wholes and groups.

Superpixels are merged in order of the cost of a merger, which grows with the regions' differences in colour and
texture, the strength of the edge between them and the smaller one's size. Three moments of that are the levels. The
regions are no labels, but people's segments resemble them, and photos have what generated pictures lack. Needs
scikit-image and scipy.

Shape suffixes: H and W rows and columns, C channels, R regions, B bins of colours, L levels.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.segmentation import slic

from examples.generate_pictures import PHOTOS
from examples.vit_nano.scene import Layered, Numbers, Pixels

ANALYSED = 320
"""Longer side in pixels at which regions are found."""
SUPERPIXELS = 500
COMPACTNESS = 0.15
"""Weight of nearness against likeness of colour in superpixels."""
REGIONS = ((28, 55), (13, 28), (5, 13))
"""Least and greatest number of regions at each level."""
COLOUR_BINS = 8
MORE_PHOTOS = "photos"
"""Folder, in the training's, of photos that fetch_photos.py writes."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MergeWeights:
    """Weights of what tells regions apart."""

    texture: float = 14.0
    colours: float = 10.0
    """Weight of the difference between histograms of colours."""
    edge: float = 4.0
    size: float = 0.25
    """Exponent of the smaller region's share of the picture: large values merge small regions early."""


def regions(pixels_HWC: Pixels, counts: list[int], weights: MergeWeights) -> Numbers:
    """Return regions of a photo, numbers from 1, int32 (3, H, W).

    Args:
        pixels_HWC: uint8 RGB.
        counts: number of regions at each level.
        weights: weights of the differences.
    """
    height, width = pixels_HWC.shape[:2]
    scale = min(1.0, ANALYSED / max(height, width))
    size = max(16, round(width * scale)), max(16, round(height * scale))
    small = Image.fromarray(pixels_HWC).resize(size, Image.Resampling.LANCZOS)
    merging = _Merging(np.asarray(small), weights)
    found = []
    for merged_HW in merging.levels(counts):
        image = Image.fromarray((merged_HW + 1).astype(np.uint16))
        found.append(np.asarray(image.resize((width, height), Image.Resampling.NEAREST), dtype=np.int32))
    return np.stack(found)


def _texture_energy(light_HW: Floats) -> Floats:
    """Return logarithmic energies (H, W, 12) of gradients in four directions at three scales."""
    energies = []
    for scale in (1.0, 2.0, 4.0):
        down_HW = ndimage.gaussian_filter(light_HW, scale, order=(1, 0))
        right_HW = ndimage.gaussian_filter(light_HW, scale, order=(0, 1))
        for part_HW in (right_HW, down_HW, (right_HW + down_HW) * 0.5**0.5, (right_HW - down_HW) * 0.5**0.5):
            energies.append(np.log1p(ndimage.gaussian_filter(np.abs(part_HW) * scale, 3 * scale)))
    return np.stack(energies, -1)


def _edge_strength(lab_HWC: Floats, energy_HWC: Floats, texture: float) -> Floats:
    """Return the strength (H, W) of edges of colour, at three scales, and of texture."""

    def squares(channel_HW: Floats, scale: float) -> Floats:
        down_HW = ndimage.gaussian_filter(channel_HW, scale, order=(1, 0))
        right_HW = ndimage.gaussian_filter(channel_HW, scale, order=(0, 1))
        return (down_HW**2 + right_HW**2) * scale**2

    colour_HW = sum(
        0.5 * weight * squares(lab_HWC[..., channel], scale)
        for scale in (1.0, 2.0, 4.0)
        for channel, weight in enumerate((1.0, 1.3, 1.3))
    )
    energy_HW = sum(squares(energy_HWC[..., channel], 3.0) for channel in range(energy_HWC.shape[-1]))
    return np.sqrt(colour_HW) + 0.6 * texture * np.sqrt(energy_HW)


@dataclass
class _Edge:
    """Border between two regions."""

    strength: float = 0.0
    length: int = 0

    def add(self, other: _Edge) -> None:
        self.strength += other.strength
        self.length += other.length


@dataclass
class _Merging:
    """Regions that are merged until one is left; the first are superpixels, and each merger makes a new one."""

    pixels_HWC: Pixels
    weights: MergeWeights
    mergers: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        lab_HWC = rgb2lab(self.pixels_HWC)
        energy_HWC = _texture_energy(lab_HWC[..., 0])
        smooth_HWC = ndimage.gaussian_filter(lab_HWC, (1, 1, 0))
        self.first_HW = slic(
            smooth_HWC,
            SUPERPIXELS,
            COMPACTNESS,
            convert2lab=False,
            start_label=0,
            enforce_connectivity=True,
            channel_axis=-1,
        )
        flat, self.superpixels = self.first_HW.ravel(), int(self.first_HW.max()) + 1
        features = np.concatenate([lab_HWC, energy_HWC * self.weights.texture], -1).reshape(len(flat), -1)
        self.sums_RC = np.zeros((2 * self.superpixels, features.shape[1]))
        self.colours_RB = np.zeros((2 * self.superpixels, 3 * COLOUR_BINS))
        for channel in range(features.shape[1]):
            self.sums_RC[: self.superpixels, channel] = np.bincount(flat, features[:, channel])
        for channel, (low, high) in enumerate(((0, 100), (-50, 50), (-50, 50))):
            place = (lab_HWC[..., channel].ravel() - low) / (high - low) * COLOUR_BINS
            bins = np.clip(place.astype(int), 0, COLOUR_BINS - 1) + channel * COLOUR_BINS
            np.add.at(self.colours_RB, (flat, bins), 1)
        self.counts_R = np.zeros(2 * self.superpixels)
        self.counts_R[: self.superpixels] = np.bincount(flat)
        self.borders: list[dict[int, _Edge]] = [{} for _ in range(2 * self.superpixels)]
        self._find_borders(_edge_strength(lab_HWC, energy_HWC, self.weights.texture))
        self._merge_all()

    def _find_borders(self, strength_HW: Floats) -> None:
        for axis in (0, 1):
            ahead, behind = (np.delete(self.first_HW, place, axis) for place in (0, -1))
            strong = np.maximum(np.delete(strength_HW, 0, axis), np.delete(strength_HW, -1, axis))
            apart = ahead != behind
            pairs, which = np.unique(np.stack([behind[apart], ahead[apart]], 1), axis=0, return_inverse=True)
            sums, lengths = np.bincount(which.ravel(), strong[apart]), np.bincount(which.ravel())
            for (a, b), total, length in zip(pairs.tolist(), sums.tolist(), lengths.tolist(), strict=True):
                edge = self.borders[a].setdefault(b, _Edge())
                self.borders[b][a] = edge
                edge.add(_Edge(total, length))

    def _cost(self, a: int, b: int) -> float:
        weights, counts_R = self.weights, self.counts_R
        means = self.sums_RC[a] / counts_R[a], self.sums_RC[b] / counts_R[b]
        shares = self.colours_RB[a] / counts_R[a], self.colours_RB[b] / counts_R[b]
        border = self.borders[a][b]
        cost = float(np.linalg.norm(means[0] - means[1])) + weights.edge * border.strength / border.length
        cost += weights.colours * float(np.abs(shares[0] - shares[1]).sum()) / 2
        return cost * float(min(counts_R[a], counts_R[b]) / self.first_HW.size) ** weights.size

    def _merge_all(self) -> None:
        queue = [(self._cost(a, b), a, b) for a in range(self.superpixels) for b in self.borders[a] if a < b]
        heapq.heapify(queue)
        gone: set[int] = set()
        new = self.superpixels
        while queue:
            _, a, b = heapq.heappop(queue)
            if a in gone or b in gone:
                continue
            gone |= {a, b}
            self.mergers.append((a, b))
            for sums in (self.sums_RC, self.colours_RB, self.counts_R):
                sums[new] = sums[a] + sums[b]
            for old in (a, b):
                for other, edge in self.borders[old].items():
                    if other not in gone:
                        self.borders[new].setdefault(other, _Edge()).add(edge)
                        self.borders[other][new] = self.borders[new][other]
            for other in self.borders[new]:
                heapq.heappush(queue, (self._cost(new, other), new, other))
            new += 1

    def levels(self, counts: list[int]) -> list[Numbers]:
        """Return the regions when only so many were left, numbered from 0: int32 (H, W) for each count."""
        found = []
        for count in counts:
            into = np.arange(2 * self.superpixels)
            for i, (a, b) in enumerate(self.mergers[: max(0, self.superpixels - count)]):
                into[a] = into[b] = self.superpixels + i
            for region in range(len(into) - 1, -1, -1):
                into[region] = into[into[region]]
            found.append(np.unique(into[self.first_HW], return_inverse=True)[1].reshape(self.first_HW.shape))
        return found


@cache
def photos(folder: Path) -> list[Image.Image]:
    """Return the photos of a folder and of examples/photos, by name.

    Args:
        folder: folder that fetch_photos.py wrote.
    """
    paths = [*sorted(folder.glob("*.jpg")), *sorted([*PHOTOS.glob("*.jpg"), *PHOTOS.glob("*.png")])]
    return [Image.open(path).convert("RGB") for path in paths]


def part_of_photo(folder: Path, seed: int, index: int, side: int) -> Layered:
    """Return a part of a photo, its longer side `side` pixels, with its regions; deterministic.

    Args:
        folder: folder that fetch_photos.py wrote.
        seed, index: number of the picture; photos are taken in turn.
        side: pixels.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index, 3])))
    every = photos(folder)
    photo = every[index % len(every)]
    share = (
        1.0
        if rng.random() < 0.35
        else np.exp(rng.uniform(np.log(0.42 if max(photo.size) > 700 else 0.65), 0))
    )
    width = share * photo.width
    height = width / rng.choice([1.5, 4 / 3, 1.0, 0.75, 2 / 3])
    if height > photo.height:
        width, height = width * photo.height / height, photo.height
    x, y = rng.uniform(0, photo.width - width + 1e-9), rng.uniform(0, photo.height - height + 1e-9)
    size = round(width * side / max(width, height)), round(height * side / max(width, height))
    box = (x, y, min(x + width, photo.width), min(y + height, photo.height))
    pixels_HWC = np.asarray(photo.resize(size, Image.Resampling.LANCZOS, box))
    weights = MergeWeights(texture=rng.uniform(10, 18), edge=rng.uniform(3, 5), size=rng.uniform(0.15, 0.35))
    return Layered(pixels_HWC, regions(pixels_HWC, [int(rng.integers(*some)) for some in REGIONS], weights))
