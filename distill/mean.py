"""The mean embedding of some rows: the constant that a student has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..store import EmbeddingStore
from .sampler import split_batches

_ROWS_AT_ONCE = 8


def mean_embedding(store: EmbeddingStore, rows: Sequence[int]) -> Tensor:
    """The mean of stored embeddings, float32 (256, g, g), summed in float64.

    A run has its training rows' mean already (Run.mean_embedding); this reads the store once more. Raises
    StoreDamaged naming a row.
    """
    grid = store.spec.grid
    sum_CHW = torch.zeros(256, grid, grid, dtype=torch.float64)
    for some in split_batches(rows, _ROWS_AT_ONCE):
        sum_CHW += torch.from_numpy(store.read(some).to_float32()).double().sum(dim=0)
    return (sum_CHW / max(len(rows), 1)).float()
