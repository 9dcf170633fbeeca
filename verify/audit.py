"""Whether the embeddings that are compared with are the teacher's: what the store's audits say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..store import EmbeddingStore, tolerance


def audit_summary(store: EmbeddingStore) -> dict[str, Any] | None:
    """The store's audits, as {rows, cosine_min, relative_mse_max, tolerance}; None when no row was audited."""
    audits = store.audits()
    if not audits:
        return None
    allowed = tolerance(store.spec.dtype, store.spec.precision)
    return {
        "rows": len(audits),
        "cosine_min": min(audit.cosine for audit in audits),
        "relative_mse_max": max(audit.relative_mse for audit in audits),
        "tolerance": {"cosine": allowed.cosine, "relative_mse": allowed.relative_mse},
    }


def audit_checks(audit: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The audits as checks, {check, metric, value, threshold, passed}: none where nothing was audited."""
    if audit is None:
        return []
    cosine, relative_mse = audit["cosine_min"], audit["relative_mse_max"]
    allowed = audit["tolerance"]
    return [
        _check("cosine_min", cosine, allowed["cosine"], cosine >= allowed["cosine"]),
        _check(
            "relative_mse_max", relative_mse, allowed["relative_mse"], relative_mse <= allowed["relative_mse"]
        ),
    ]


def _check(metric: str, value: float, threshold: float, passed: bool) -> dict[str, Any]:
    return {"check": "audit", "metric": metric, "value": value, "threshold": threshold, "passed": passed}
