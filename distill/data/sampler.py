"""Sampler: the split into training and validation rows, the order of an epoch, and its cut into batches.

All of it is pure: the split depends on the contents of the images, the order on seed and epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...common.errors import DistillError


@dataclass(frozen=True)
class Split:
    """Rows of a store to train on and rows to validate on, both ascending."""

    train: tuple[int, ...]
    val: tuple[int, ...]


def split_rows(sha256_by_row: Mapping[int, str], val_fraction: float) -> Split:
    """Split rows by the SHA-256 of their image file, read as a fraction of 1: below `val_fraction` is validation.

    Copies of one file share their hash and so their side. An image's side never depends on the other images, unless
    a side would be empty: then the distinct image nearest to the threshold changes sides.

    Args:
        sha256_by_row: hexadecimal SHA-256 of each row's image file.
        val_fraction: threshold between 0 and 1, on the first 64 bits of the hash.

    Raises:
        DistillError: there are no two distinct images.
    """
    position = {digest: int(digest[:16], 16) / 2**64 for digest in set(sha256_by_row.values())}
    if len(position) < 2:
        raise DistillError(
            f"{len(sha256_by_row)} rows hold {len(position)} distinct image(s): training and validation need "
            "one each. Precompute at least two different images."
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
    """Return a permutation of `rows` that differs by seed and epoch and is the same on every machine.

    It sorts raw PCG64 integers: numpy keeps the streams of its bit generators stable between versions, which
    it doesn't promise for Generator.permutation.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    order = np.argsort(bits.random_raw(len(rows)), kind="stable")
    return [int(rows[i]) for i in order]


def split_batches(rows: Sequence[int], size: int) -> list[list[int]]:
    """Cut `rows` into lists of `size`; the last one may be shorter, none is dropped."""
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
