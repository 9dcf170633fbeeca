"""Limits of audits."""

from __future__ import annotations

import math

from mobilesam.store import (
    DTYPES,
    PRECISIONS,
    TOLERANCES,
    Audit,
    EmbeddingStore,
    tolerance,
)


def _audit(row: int, cosine: float = 1.0, relative_mse: float = 0.0) -> Audit:
    return Audit(row=row, cosine=cosine, relative_mse=relative_mse)


def test_audits_out_of_tolerance_are_listed(full_store: EmbeddingStore) -> None:
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
