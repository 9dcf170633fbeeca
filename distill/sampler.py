"""Which rows a step sees, in which order: a pure function of the seed and the epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def epoch_order(rows: Sequence[int], seed: int, epoch: int) -> list[int]:
    """A permutation of `rows` that differs by seed and epoch and is the same on every machine.

    It sorts raw PCG64 integers: numpy keeps the streams of its bit generators stable between versions, which
    it doesn't promise for Generator.permutation.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    order = np.argsort(bits.random_raw(len(rows)), kind="stable")
    return [int(rows[i]) for i in order]


def split_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    """Cuts `rows` into lists of `size`; the last one may be shorter, none is dropped."""
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
