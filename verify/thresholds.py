"""Checks of a result against thresholds on the headline metrics, and of the store's audits; their descriptions.

A check is {check, metric, value, threshold, passed}: `check` is the threshold's name or "audit", `metric` is the path
of the number in the result, keys joined by dots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..store import EmbeddingStore, audit_summary, tolerance

MINIMUMS = {"min_cosine": ("cosine_valid", "mean"), "min_skill": ("skill_valid",), "min_miou": ("miou",)}
"""Path in a result of the number that each threshold bounds: over valid cells where there are two numbers."""


def run_checks(result: Mapping[str, Any], thresholds: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Check a result against all thresholds that are set. An undefined metric (None or NaN) fails.

    Args:
        result: result of `verify`.
        thresholds: smallest allowed value by name, a key of MINIMUMS; None if not set.

    Returns:
        Checks, in the order of `thresholds`.
    """
    checks = []
    for check, threshold in thresholds.items():
        if threshold is None:
            continue
        value: Any = result
        for part in MINIMUMS[check]:
            value = value[part]
        defined = value is not None and not math.isnan(value)
        checks.append(
            {
                "check": check,
                "metric": ".".join(MINIMUMS[check]),
                "value": float(value) if defined else None,
                "threshold": threshold,
                "passed": defined and value >= threshold,
            }
        )
    return checks


def store_audit(store: EmbeddingStore) -> dict[str, Any] | None:
    """Summarise the store's audits by `audit_summary`; None if no row was audited."""
    return audit_summary(store.manifest.audits(), tolerance(store.spec.dtype, store.spec.precision))


def audit_checks(audit: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Check a summary of audits against its tolerance; no checks for None, where no row was audited."""
    if audit is None:
        return []
    cosine, error, allowed = audit["cosine_min"], audit["relative_mse_max"], audit["tolerance"]
    cosine_passed = cosine is not None and cosine >= allowed["cosine"]
    error_passed = error is not None and error <= allowed["relative_mse"]
    return [
        _audit_check("cosine_min", cosine, allowed["cosine"], cosine_passed),
        _audit_check("relative_mse_max", error, allowed["relative_mse"], error_passed),
    ]


def _audit_check(metric: str, value: float | None, threshold: float, passed: bool) -> dict[str, Any]:
    return {"check": "audit", "metric": metric, "value": value, "threshold": threshold, "passed": passed}


def audit_faults(store: EmbeddingStore) -> list[str]:
    """Return a line for each metric of the store's audits that is out of tolerance."""
    return [describe(check) for check in failed_checks(audit_checks(store_audit(store)))]


def failed_checks(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the failed checks in the form of the JSON output: {check, metric, value, threshold}."""
    return [{k: v for k, v in check.items() if k != "passed"} for check in checks if not check["passed"]]


def describe(check: Mapping[str, Any]) -> str:
    """Describe a check on one line with both numbers, such as "cosine 0.8731 is below 0.9"."""
    if check["check"] == "audit":
        return _describe_audit(check)
    name = check["check"].removeprefix("min_")
    if check["value"] is None:
        return f"{name} is undefined, the threshold is {check['threshold']:g}"
    value, threshold = distinguishable(check["value"], check["threshold"])
    return f"{name} {value} {'reaches' if check['value'] >= check['threshold'] else 'is below'} {threshold}"


def _describe_audit(check: Mapping[str, Any]) -> str:
    # The threshold has more digits than the value may have: 0.99999 must not become 1.
    threshold = f"{check['threshold']:g}"
    value = "undefined" if check["value"] is None else distinguishable(check["value"], check["threshold"])[0]
    name, relation = {"cosine_min": ("cosine", "below"), "relative_mse_max": ("relative mse", "above")}[
        check["metric"]
    ]
    return (
        f"the store's audit: {name} {value} with the teacher run again is {relation} {threshold}, so the stored "
        "embeddings are not this teacher's: precompute them into a new store"
    )


def distinguishable(value: float, threshold: float) -> tuple[str, str]:
    """Format two numbers with enough digits for their texts to differ, unless they are equal.

    Args:
        value: number, shown with at least four digits.
        threshold: number, shown with at least six digits, so that 0.999999 doesn't become 1.
    """
    for digits in range(4, 17):
        texts = f"{value:.{digits}g}", f"{threshold:.{max(digits, 6)}g}"
        if value == threshold or texts[0] != texts[1]:
            return texts
    return repr(value), repr(threshold)
