"""What a fresh run of the teacher gave for some rows, and what of it is tolerated."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from small_store import HEAD, compute, embeddings

from mobilesam.store import (
    DTYPES,
    PRECISIONS,
    TOLERANCES,
    Audit,
    EmbeddingStore,
    StoreError,
    StoreMismatch,
    tolerance,
)

NewStore = Callable[..., EmbeddingStore]


def _audit(row: int, cosine: float = 1.0, relative_mse: float = 0.0) -> Audit:
    return Audit(row=row, cosine=cosine, relative_mse=relative_mse)


def test_audits_are_kept_in_row_order_and_replaced_by_newer_ones(full_store: EmbeddingStore) -> None:
    full_store.record_audits([_audit(5, 0.5), _audit(1)])
    full_store.record_audits([_audit(5, 0.75)])
    with EmbeddingStore.open(full_store.path) as reader:
        assert reader.manifest.audits() == [_audit(1), _audit(5, 0.75)]


def test_an_audit_goes_when_its_shard_is_withdrawn(full_store: EmbeddingStore) -> None:
    full_store.record_audits([_audit(0), _audit(4), _audit(7)])
    full_store.withdraw([1])
    assert [audit.row for audit in full_store.manifest.audits()] == [0, 7]


@pytest.mark.parametrize("row", [4, 7, 99])
def test_a_row_that_is_not_done_cant_have_been_audited(new_store: NewStore, row: int) -> None:
    store = new_store()
    compute(store, embeddings(), failed=[4], shards=[0, 1])
    with pytest.raises(StoreError, match=f"row {row} .* is not done"):
        store.record_audits([_audit(0), _audit(row)])
    assert store.manifest.audits() == []


def test_audits_out_of_tolerance_are_told(full_store: EmbeddingStore) -> None:
    limits = tolerance("float16", "float32")
    full_store.record_audits(
        [
            _audit(0, limits.cosine, limits.relative_mse),
            _audit(1, limits.cosine - 1e-6, 0),
            _audit(2, 1, 2 * limits.relative_mse),
            _audit(3, math.nan, 0),
            _audit(4, 1, math.nan),
        ]
    )
    assert [audit.row for audit in full_store.audits_out_of_tolerance()] == [1, 2, 3, 4]


def test_there_is_a_tolerance_for_every_dtype_and_precision() -> None:
    assert set(TOLERANCES) == {(dtype, precision) for dtype in DTYPES for precision in PRECISIONS}


def test_a_lost_head_is_written_anew_and_another_one_is_refused(full_store: EmbeddingStore) -> None:
    full_store.head_path.unlink()
    with pytest.raises(StoreMismatch, match=r"is not the one that .* was made with"):
        full_store.restore_head(HEAD + b" ")
    assert not full_store.head_path.exists()
    full_store.restore_head(HEAD)
    assert full_store.read_head() == HEAD
