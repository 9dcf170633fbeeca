"""Sampler: the split into training and validation rows, the order of rows in an epoch, and batches.

All functions are pure: the split depends on the contents of the images, the order on seed and epoch.

Shape suffixes: N rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...common.errors import DistillError, counted
from .rows import CommittedRows


@dataclass(frozen=True)
class Split:
    """Rows of a store to train on and rows to validate on, both ascending."""

    train: Sequence[int]
    val: Sequence[int]


def split_rows(rows: CommittedRows, val_fraction: float) -> Split:
    """Split rows by the SHA-256 of their image file.

    The first 64 bits of the hash, as a fraction of 2^64, are compared with `val_fraction`: below it the row is for
    validation. Copies of a file are in the same part. An image's part doesn't depend on other images, unless a part
    would be empty: then the distinct image nearest to the threshold is moved.

    Args:
        rows: rows of a store.
        val_fraction: threshold between 0 and 1.

    Returns:
        Arrays of 8 bytes a row.

    Raises:
        DistillError: there are fewer than two distinct images.
    """
    sha256_N = rows.sha256_N
    if not (sha256_N != sha256_N[:1]).any():
        distinct = min(len(rows), 1)
        raise DistillError(
            f"{counted(len(rows), 'row')} with {counted(distinct, 'distinct image')}: training and "
            "validation need one each. Precompute at least two different images."
        )
    first_N = np.ascontiguousarray(sha256_N).view(">u8").reshape(len(rows), 4)[:, 0]
    val_N = first_N.astype(np.float64) / 2**64 < val_fraction
    if not val_N.any():
        val_N = sha256_N == np.sort(sha256_N)[0]
    elif val_N.all():
        val_N = sha256_N != np.sort(sha256_N)[-1]
    return Split(
        train=array("q", rows.rows_N[~val_N].tobytes()), val=array("q", rows.rows_N[val_N].tobytes())
    )


def epoch_order(rows: Sequence[int], seed: int, epoch: int) -> Sequence[int]:
    """Return a permutation of `rows` that depends on seed and epoch and is the same on every machine.

    It sorts raw PCG64 integers: numpy keeps the streams of its bit generators stable between versions, which
    it doesn't promise for Generator.permutation.

    Args:
        rows: row numbers.
        seed: seed of the run, 0 or more.
        epoch: number of the epoch, from 0.

    Returns:
        An array of 8 bytes a row.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    order = np.argsort(bits.random_raw(len(rows)), kind="stable")
    return array("q", np.asarray(rows, dtype=np.int64)[order].tobytes())


def split_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    """Cut rows into consecutive batches.

    Args:
        rows: row numbers, in order.
        size: rows per batch, 1 or more.

    Returns:
        Lists of `size` rows; the last one may be shorter. No row is dropped.
    """
    return list(each_batch(rows, size))


def each_batch(rows: Sequence[int], size: int, first: int = 0) -> Iterator[list[int]]:
    """Yield the batches of `split_batches` one by one.

    Args:
        rows: row numbers, in order.
        size: rows per batch, 1 or more.
        first: number of the batch to begin with, from 0.
    """
    for i in range(first * size, len(rows), size):
        yield list(rows[i : i + size])
