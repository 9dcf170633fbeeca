"""Table of the second stages' benchmark, and the whole benchmark at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.two_stages import main, table


def test_a_row_has_the_mean_of_a_way_and_a_number_of_steps_over_seeds() -> None:
    runs = [
        {
            "way": way,
            "seed": seed,
            "steps": 500,
            "miou": miou,
            "gain": gain,
            "skill": 0.8,
            "seconds": 10 + seed,
        }
        for seed in (0, 1)
        for way, miou, gain in (("first stage", 0.6, 0.0), ("decoupled", 0.65 + seed / 10, 0.05 + seed / 10))
    ]
    made = table({"first": 500, "lr": None, "runs": runs})
    assert made.title == "After 500 decoupled steps of batch 4, rate the recipe's, 2 seeds"
    assert made.rows == [
        ["first stage", "500", "0.600 ± 0.000", "", "0.800 ± 0.000", "10 s"],
        ["decoupled", "500", "0.700 ± 0.071", "+0.100 ± 0.071", "0.800 ± 0.000", "10 s"],
    ]


@pytest.mark.long
def test_the_benchmark_runs_at_a_small_size_and_resumes(tmp_path: Path) -> None:
    small = ["--image-size", "64", "--pictures", "8", "--test-pictures", "2", "--student", "timm:test_resnet"]
    small += ["--first", "2", "--second", "2", "--same-time", "4", "--seeds", "0", "--ways"]
    small += ["decoupled; semi_coupled, MSE 1; decoder", "--out", str(tmp_path), "--json"]
    for _ in range(2):
        result = CliRunner().invoke(main, small, catch_exceptions=False)
        assert result.exit_code == 0
    runs = json.loads(result.stdout)["runs"]
    assert [(run["way"], run["steps"]) for run in runs] == [
        ("first stage", 2),
        ("decoupled", 2),
        ("decoupled", 4),
        ("semi_coupled, MSE 1", 2),
        ("decoder", 2),
    ]
    first = runs[0]["miou"]
    assert all(run["gain"] == pytest.approx(run["miou"] - first) for run in runs)
