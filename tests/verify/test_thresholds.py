from __future__ import annotations

import json

import pytest

from mobilesam.verify.thresholds import audit_checks, describe, distinguishable, failed_checks, run_checks


def result(cosine: float | None, skill: float | None) -> dict:
    # The numbers over all cells are perfect, so that a check that reads them instead of the valid ones shows.
    return {
        "cosine": {"mean": 1.0},
        "skill": 1.0,
        "cosine_valid": {"mean": cosine, "p5": 1.0, "min": 1.0},
        "skill_valid": skill,
    }


def test_without_thresholds_nothing_is_checked():
    assert run_checks(result(0.1, -3.0), {"min_cosine": None, "min_skill": None}) == []


def test_a_miss_is_reported_with_its_name_and_both_numbers():
    checks = run_checks(result(0.91, 0.5), {"min_cosine": 0.95, "min_skill": 0.4})
    assert [check["passed"] for check in checks] == [False, True]
    assert failed_checks(checks) == [
        {"check": "min_cosine", "metric": "cosine_valid.mean", "value": 0.91, "threshold": 0.95}
    ]
    assert [describe(check) for check in checks] == ["cosine 0.91 is below 0.95", "skill 0.5 reaches 0.4"]


def test_a_threshold_is_met_by_equality():
    assert failed_checks(run_checks(result(0.95, 0.0), {"min_cosine": 0.95, "min_skill": 0.0})) == []


def test_the_masks_threshold_reads_the_mean_and_not_the_worst_image():
    masks = {"miou": 0.8, "miou_min": 0.1}
    assert failed_checks(run_checks(masks, {"min_miou": 0.8})) == []
    (failed,) = failed_checks(run_checks(masks, {"min_miou": 0.9}))
    assert (failed["metric"], describe(failed)) == ("miou", "miou 0.8 is below 0.9")
    (undefined,) = failed_checks(run_checks({"miou": None}, {"min_miou": 0.0}))
    assert describe(undefined) == "miou is undefined, the threshold is 0"


@pytest.mark.parametrize("undefined", [None, float("nan")])
def test_an_undefined_metric_fails_even_the_lowest_threshold(undefined):
    checks = run_checks(result(undefined, undefined), {"min_cosine": -1.0, "min_skill": -1e9})
    assert [check["check"] for check in failed_checks(checks)] == ["min_cosine", "min_skill"]
    json.dumps(checks, allow_nan=False)
    assert "undefined" in describe(checks[0])


@pytest.mark.parametrize(
    ("value", "threshold", "texts"),
    [
        (0.5, 0.6, ("0.5", "0.6")),
        (0.949996, 0.95, ("0.949996", "0.95")),
        (0.9, 0.9, ("0.9", "0.9")),
        (0.0204, 0.999999, ("0.0204", "0.999999")),
        (0.1 + 0.2, 0.3, ("0.30000000000000004", "0.3")),
    ],
)
def test_two_different_numbers_never_read_alike(value, threshold, texts):
    assert distinguishable(value, threshold) == texts


def audit(cosine: float, relative_mse: float) -> dict:
    return {
        "rows": 2,
        "cosine_min": cosine,
        "relative_mse_max": relative_mse,
        "tolerance": {"cosine": 0.999, "relative_mse": 2e-3},
    }


def test_an_audit_within_tolerance_fails_nothing_and_a_store_without_one_has_no_checks():
    assert failed_checks(audit_checks(audit(0.999, 2e-3))) == []
    assert audit_checks(None) == []


@pytest.mark.parametrize(
    ("cosine", "relative_mse", "metric", "text"),
    [
        (0.98, 1e-3, "cosine_min", "cosine 0.98 with the teacher run again is below 0.999"),
        (0.9995, 0.5, "relative_mse_max", "relative mse 0.5 with the teacher run again is above 0.002"),
        (float("nan"), 1e-3, "cosine_min", "cosine nan"),
    ],
)
def test_an_audit_out_of_tolerance_is_a_failed_check_with_both_numbers(cosine, relative_mse, metric, text):
    (failed,) = failed_checks(audit_checks(audit(cosine, relative_mse)))
    assert (failed["check"], failed["metric"]) == ("audit", metric)
    assert text in describe(failed)
    assert "precompute" in describe(failed)


def test_an_audits_limit_is_not_rounded():
    audited = audit(0.41, 1e-6) | {"tolerance": {"cosine": 0.99999, "relative_mse": 3e-5}}
    (failed,) = failed_checks(audit_checks(audited))
    assert "cosine 0.41 with the teacher run again is below 0.99999" in describe(failed)
