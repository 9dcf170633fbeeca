"""Sampler: the split into training and validation rows, the order of rows in an epoch, and batches.

All functions are pure: the split depends on the contents of the images, the order on seed and epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...common.errors import DistillError, counted


@dataclass(frozen=True)
class Split:
    """Rows of a store to train on and rows to validate on, both ascending."""

    train: tuple[int, ...]
    val: tuple[int, ...]


def split_rows(sha256_by_row: Mapping[int, str], val_fraction: float) -> Split:
    """Split rows by the SHA-256 of their image file.

    The first 64 bits of the hash, as a fraction of 2^64, are compared with `val_fraction`: below it the row is for
    validation. Copies of a file are in the same part. An image's part doesn't depend on other images, unless a part
    would be empty: then the distinct image nearest to the threshold is moved.

    Args:
        sha256_by_row: hexadecimal SHA-256 of each row's image file.
        val_fraction: threshold between 0 and 1.

    Raises:
        DistillError: there are fewer than two distinct images.
    """
    position = {digest: int(digest[:16], 16) / 2**64 for digest in set(sha256_by_row.values())}
    if len(position) < 2:
        raise DistillError(
            f"{counted(len(sha256_by_row), 'row')} with {counted(len(position), 'distinct image')}: training and "
            "validation need one each. Precompute at least two different images."
        )
    val = {digest for digest, p in position.items() if p < val_fraction}
    if not val:
        val = {min(position, key=lambda digest: (position[digest], digest))}
    elif len(val) == len(position):
        val.remove(max(position, key=lambda digest: (position[digest], digest)))
    rows = sorted(sha256_by_row)
    return Split(
        train=tuple(row for row in rows if sha256_by_row[row] not in val),
        val=tuple(row for row in rows if sha256_by_row[row] in val),
    )


def epoch_order(rows: Sequence[int], seed: int, epoch: int) -> list[int]:
    """Return a permutation of `rows` that depends on seed and epoch and is the same on every machine.

    It sorts raw PCG64 integers: numpy keeps the streams of its bit generators stable between versions, which
    it doesn't promise for Generator.permutation.

    Args:
        rows: row numbers.
        seed: seed of the run, 0 or more.
        epoch: number of the epoch, from 0.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    order = np.argsort(bits.random_raw(len(rows)), kind="stable")
    return [int(rows[i]) for i in order]


def split_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    """Cut rows into consecutive batches.

    Args:
        rows: row numbers, in order.
        size: rows per batch, 1 or more.

    Returns:
        Lists of `size` rows; the last one may be shorter. No row is dropped.
    """
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
