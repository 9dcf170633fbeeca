"""Whether the embeddings that are compared with are the teacher's: what the store's audits say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..store import EmbeddingStore, audit_summary, tolerance
from .gates import describe, failed_checks


def store_audit(store: EmbeddingStore) -> dict[str, Any] | None:
    """The store's audits, as `audit_summary` gives them."""
    return audit_summary(store.audits(), tolerance(store.spec.dtype, store.spec.precision))


def audit_checks(audit: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The audits as checks, {check, metric, value, threshold, passed}: none where nothing was audited."""
    if audit is None:
        return []
    cosine, error, allowed = audit["cosine_min"], audit["relative_mse_max"], audit["tolerance"]
    cosine_passed = cosine is not None and cosine >= allowed["cosine"]
    error_passed = error is not None and error <= allowed["relative_mse"]
    return [
        _check("cosine_min", cosine, allowed["cosine"], cosine_passed),
        _check("relative_mse_max", error, allowed["relative_mse"], error_passed),
    ]


def audit_faults(store: EmbeddingStore) -> list[str]:
    """A line for each way in which the store's audits are out of tolerance."""
    return [describe(check) for check in failed_checks(audit_checks(store_audit(store)))]


def _check(metric: str, value: float | None, threshold: float, passed: bool) -> dict[str, Any]:
    return {"check": "audit", "metric": metric, "value": value, "threshold": threshold, "passed": passed}
