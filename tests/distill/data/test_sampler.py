from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilesam.distill import DistillError
from mobilesam.distill.data.rows import CommittedRows
from mobilesam.distill.data.sampler import epoch_order, split_batches, split_rows


def rows_of(by_row: dict[int, str]) -> CommittedRows:
    hashes = np.array([bytes.fromhex(digest) for digest in by_row.values()], dtype="S32")
    return CommittedRows(np.array(list(by_row), dtype=np.int64), hashes, "")


def hashes(count: int) -> CommittedRows:
    return rows_of({row: hashlib.sha256(str(row).encode()).hexdigest() for row in range(count)})


def reference_split(by_row: dict[int, str], fraction: float) -> tuple[list[int], list[int]]:
    """The split in exact arithmetic, image by image."""
    place = {digest: Fraction(int(digest[:16], 16), 2**64) for digest in by_row.values()}
    val = {digest for digest, at in place.items() if at < Fraction(fraction)}
    if not val:
        val = {min(place)}
    elif len(val) == len(place):
        val.remove(max(place))
    return [row for row in by_row if by_row[row] not in val], [row for row in by_row if by_row[row] in val]


@given(st.lists(st.binary(max_size=2), min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_both_sides_of_a_split_have_an_image_and_copies_stay_together(
    contents: list[bytes], fraction: float
) -> None:
    by_row = {row: hashlib.sha256(content).hexdigest() for row, content in enumerate(contents)}
    if len(set(contents)) < 2:
        with pytest.raises(DistillError, match="1 distinct"):
            split_rows(rows_of(by_row), fraction)
        return
    split = split_rows(rows_of(by_row), fraction)
    assert (list(split.train), list(split.val)) == reference_split(by_row, fraction)
    assert sorted([*split.train, *split.val]) == list(by_row)
    assert split.train
    assert split.val
    assert not {by_row[row] for row in split.train} & {by_row[row] for row in split.val}


def test_the_validation_share_of_many_images_is_about_the_fraction_asked_for() -> None:
    split = split_rows(hashes(20_000), 0.05)
    # Five standard deviations of a binomial count.
    assert abs(len(split.val) - 1000) < 5 * (20_000 * 0.05 * 0.95) ** 0.5


def test_an_image_keeps_its_side_when_others_are_added() -> None:
    few, many = split_rows(hashes(500), 0.1), split_rows(hashes(1000), 0.1)
    assert set(few.val) == {row for row in many.val if row < 500}


def test_the_split_compares_the_first_64_bits_of_the_hash_with_the_fraction() -> None:
    by_row = {0: "4" + "0" * 63, 1: "3" + "f" * 63, 2: "c" + "0" * 63}
    assert list(split_rows(rows_of(by_row), 0.25).val) == [1]


def test_a_split_of_no_images_is_refused() -> None:
    with pytest.raises(DistillError, match="0 distinct"):
        split_rows(rows_of({}), 0.05)


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=60), st.integers(0, 2**62), st.integers(0, 99))
def test_an_epoch_sees_every_row_once(rows: list[int], seed: int, epoch: int) -> None:
    assert sorted(epoch_order(rows, seed, epoch)) == sorted(rows)


def test_the_order_of_rows_differs_by_epoch_and_seed_and_is_reproducible() -> None:
    rows = range(100)
    first = epoch_order(rows, 0, 0)
    assert first == epoch_order(rows, 0, 0)
    assert len({tuple(epoch_order(rows, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_the_order_of_rows_is_the_same_on_every_machine() -> None:
    assert list(epoch_order(range(8), 7, 1)) == [1, 3, 2, 7, 4, 5, 0, 6]


@given(st.integers(0, 40), st.integers(1, 9))
def test_no_row_is_dropped_when_cutting_batches(count: int, size: int) -> None:
    batches = split_batches(range(count), size)
    assert [row for batch in batches for row in batch] == list(range(count))
    assert all(len(batch) == size for batch in batches[:-1])
