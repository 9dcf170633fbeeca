"""Metrics of embeddings, accumulated in float64.

Every metric has two values: over all cells of the grid, and, with the suffix `_valid`, over the cells whose centre
lies in the image. s is the student's embedding, t the teacher's.

- mse: mean of (s - t)^2 over all elements.
- relative_mse: sum (s - t)^2 / sum (t - t_c)^2, where t_c is the teacher's mean per channel over the same cells.
- cosine: cosine similarity over the channels at each cell, averaged over an image's cells; then mean, 5th percentile
  and minimum over images.
- skill: 1 - mse / mse of always predicting the training rows' mean embedding. That constant has 0, the teacher 1.

Shape suffixes: B images, C channels, H and W rows and columns of the grid, L cells of one image, flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...store import EmbeddingStore
from ..data.sampler import split_batches

_TINY = 1e-30
"""Smallest product of norms to divide by, so that the cosine of a zero vector is 0."""
_ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class ImageMetrics:
    """Metrics of one image, over all cells and over the valid ones."""

    mse: float
    mse_valid: float
    cosine: float
    cosine_valid: float


class Metrics:
    """Accumulator of the metrics over images.

    Args:
        mean_CHW: the training rows' mean embedding (256, g, g), any float dtype; None leaves skill undefined.

    Attributes:
        per_image: metrics of each image, in the order in which the images were added.
    """

    def __init__(self, mean_CHW: Tensor | None) -> None:
        self._mean_CHW = None if mean_CHW is None else mean_CHW.double()
        self._all = _Region()
        self._valid = _Region()
        self.per_image: list[ImageMetrics] = []

    def update(self, student_BCHW: Tensor, teacher_BCHW: Tensor, valid_BHW: Tensor) -> None:
        """Add a batch.

        Args:
            student_BCHW: (B, 256, g, g), any float dtype, on any device.
            teacher_BCHW: (B, 256, g, g), any float dtype, on the same device.
            valid_BHW: bool (B, g, g), True for cells whose centre lies in the image; at least one per image.
        """
        if self._mean_CHW is not None:
            self._mean_CHW = self._mean_CHW.to(teacher_BCHW.device)
        if not len(teacher_BCHW):
            return
        with torch.no_grad():
            sums = torch.stack(
                [
                    self._sums(student_CHW.double(), teacher_CHW.double(), valid_HW.to(teacher_CHW.device))
                    for student_CHW, teacher_CHW, valid_HW in zip(
                        student_BCHW, teacher_BCHW, valid_BHW, strict=True
                    )
                ]
            ).cpu()  # the only wait for a GPU
        for everywhere, valid in sums:
            mse, cosine = self._all.add(everywhere)
            mse_valid, cosine_valid = self._valid.add(valid)
            self.per_image.append(
                ImageMetrics(mse=mse, mse_valid=mse_valid, cosine=cosine, cosine_valid=cosine_valid)
            )

    def _sums(self, student_CHW: Tensor, teacher_CHW: Tensor, valid_HW: Tensor) -> Tensor:
        """Return sums of one image for `_Region.add`, float64 (2, 5 + C): over all cells, and over the valid ones."""
        student_CL, teacher_CL = student_CHW.flatten(1), teacher_CHW.flatten(1)
        squared_L = (student_CL - teacher_CL).square().sum(dim=0)
        norms_L = student_CL.norm(dim=0) * teacher_CL.norm(dim=0)
        cosine_L = (student_CL * teacher_CL).sum(dim=0) / norms_L.clamp_min(_TINY)
        constant_L = torch.zeros_like(squared_L)
        if self._mean_CHW is not None:
            constant_L = (self._mean_CHW.flatten(1) - teacher_CL).square().sum(dim=0)
        per_cell_4L = torch.stack((torch.ones_like(squared_L), squared_L, constant_L, cosine_L))
        valid_L = valid_HW.flatten()
        regions = []
        for inside_L in (torch.ones_like(valid_L), valid_L):
            sums_4 = torch.where(inside_L, per_cell_4L, 0.0).sum(dim=1)
            mean_C = torch.where(inside_L, teacher_CL, 0.0).sum(dim=1) / sums_4[0]
            deviations_CL = torch.where(inside_L, teacher_CL - mean_C[:, None], 0.0)
            regions.append(torch.cat((sums_4, deviations_CL.square().sum()[None], mean_C)))
        return torch.stack(regions)

    def merge(self, other: Metrics) -> None:
        """Add the images that another process has measured with the same mean embedding."""
        self._all.merge(other._all)
        self._valid.merge(other._valid)
        self.per_image += other.per_image

    def on_cpu(self) -> Metrics:
        """Move the accumulator's tensors to the CPU in place, to send it to another process, and return it."""
        if self._mean_CHW is not None:
            self._mean_CHW = self._mean_CHW.cpu()
        return self

    def result(self) -> dict[str, Any]:
        """Return the metrics over all images.

        Returns:
            `mse`, `relative_mse`, `cosine` {mean, p5, min} and `skill`, each also with the suffix `_valid`: plain
            floats. An undefined metric is None: all of them without images; relative_mse if the teacher's embeddings
            are constant; skill without a mean embedding, or if the teacher's embeddings equal it.
        """
        with_skill = self._mean_CHW is not None
        everywhere, valid = self._all.result(with_skill), self._valid.result(with_skill)
        merged: dict[str, Any] = {}
        for name, value in everywhere.items():
            merged[name] = value
            merged[f"{name}_valid"] = valid[name]
        return merged


def merge(shares: Sequence[Metrics]) -> Metrics:
    """Merge the metrics of several processes, images in the order of `shares`; empty without shares."""
    merged = Metrics(shares[0]._mean_CHW if shares else None)
    for share in shares:
        merged.merge(share)
    return merged


def mean_embedding(store: EmbeddingStore, rows: Sequence[int]) -> Tensor:
    """Return the mean of stored embeddings, the baseline of skill.

    A run already has the mean of its training rows (`Run.mean_embedding`); this function reads the store again.

    Args:
        store: store open for reading.
        rows: committed rows of the store.

    Returns:
        float32 (256, g, g), summed in float64.

    Raises:
        StoreDamaged: a row is damaged; the message names it.
    """
    grid = store.spec.grid
    sum_CHW = torch.zeros(256, grid, grid, dtype=torch.float64)
    for some in split_batches(rows, _ROWS_AT_ONCE):
        sum_CHW += torch.from_numpy(store.read(some).to_float32()).double().sum(dim=0)
    return (sum_CHW / max(len(rows), 1)).float()


class _Region:
    """Sums over all cells or over the valid ones, in float64 on the CPU."""

    def __init__(self) -> None:
        self.elements = 0
        self.squared = 0.0
        self.constant_squared = 0.0
        self.cells = 0
        self.mean_C: Tensor | None = None
        """Mean per channel."""
        self.spread = 0.0
        """Sum over channels of squared deviations from that channel's mean."""
        self.cosines: list[float] = []

    def add(self, sums: Tensor) -> tuple[float, float]:
        """Add one image.

        Args:
            sums: float64, on the CPU: the number of cells; the sums over these of squared errors, of squared errors
                of the mean embedding, and of cosines; the teacher's squared deviations from its mean per channel,
                summed; that mean.

        Returns:
            The image's mse and its mean cosine.
        """
        cells, squared, constant_squared, cosine, spread = sums[:5].tolist()
        mean_C = sums[5:]
        elements = len(mean_C) * round(cells)
        self.squared += squared
        self.constant_squared += constant_squared
        self.cosines.append(cosine / cells)
        self._add_spread(mean_C, spread, round(cells))
        self.elements += elements
        return squared / elements, self.cosines[-1]

    def merge(self, other: _Region) -> None:
        """Add the sums of another process."""
        self.squared += other.squared
        self.constant_squared += other.constant_squared
        self.cosines += other.cosines
        if other.mean_C is not None:
            self._add_spread(other.mean_C, other.spread, other.cells)
        self.elements += other.elements

    def _add_spread(self, mean_C: Tensor, spread: float, cells: int) -> None:
        # Means and squared deviations of two sets merge exactly (Chan, Golub and LeVeque 1979); the textbook
        # sum of squares minus square of sums would cancel.
        self.spread += spread
        if self.mean_C is None:
            self.mean_C = mean_C
        else:
            shift_C = mean_C - self.mean_C
            total = self.cells + cells
            self.spread += float(shift_C.square().sum()) * self.cells * cells / total
            self.mean_C = self.mean_C + shift_C * (cells / total)
        self.cells += cells

    def result(self, with_skill: bool) -> dict[str, Any]:
        """Return the four metrics of these cells; None where undefined."""
        cosine: dict[str, float | None] = {"mean": None, "p5": None, "min": None}
        if self.cosines:
            values = np.asarray(self.cosines, dtype=np.float64)
            cosine = {
                "mean": float(values.mean()),
                "p5": float(np.percentile(values, 5)),
                "min": float(values.min()),
            }
        return {
            "mse": _ratio(self.squared, self.elements),
            "relative_mse": _ratio(self.squared, self.spread),
            "cosine": cosine,
            "skill": 1 - self.squared / self.constant_squared
            if with_skill and self.constant_squared
            else None,
        }


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
