"""Tables of the recipes' benchmark, and the whole benchmark at a small size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.recipes import PARTS, main, tables
from mobilesam.distill.recipe import RECIPES


def outcome(recipe: str, seed: int, steps: int, miou: float) -> dict[str, Any]:
    return {
        "status": "done",
        "options": {"recipe": recipe, "seed": seed, "epochs": steps},
        "steps": steps,
        "val": {},
        "test": {"miou": miou, "skill_valid": miou + 0.1},
    }


def test_a_table_per_number_of_steps_has_the_best_recipe_first_and_its_distance_to_ours() -> None:
    runs = [outcome("mobilesam-2026", seed, 500, 0.6 + seed / 10) for seed in (0, 1)]
    runs += [outcome("edgesam", seed, 500, 0.4) for seed in (0, 1)]
    runs += [outcome("mobilesam-2026", 0, 2000, 0.7)]
    seconds = {"mobilesam-2026": 0.5, "edgesam": 0.4}
    short, long = tables({"runs": runs, "step_seconds": seconds})
    assert short.title == "500 steps of batch 4, 2 seeds"
    assert short.rows == [
        ["mobilesam-2026", "0.650 ± 0.071", "", "0.750 ± 0.071", "0.50 s (1.00)"],
        ["edgesam", "0.400 ± 0.000", "-0.250", "0.500 ± 0.000", "0.40 s (0.80)"],
    ]
    assert [row[0] for row in long.rows] == ["mobilesam-2026"]


@pytest.mark.long
def test_the_benchmark_runs_at_a_small_size_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.recipes.RECIPES", RECIPES.copy())
    small = [
        "--image-size",
        "64",
        "--pictures",
        "8",
        "--test-pictures",
        "2",
        "--student",
        "timm:test_resnet",
    ]
    small += ["--steps", "2", "--seeds", "0", "--recipes", "mobilesam-2026,nanosam", "--rounds", "1"]
    for _ in range(2):
        result = CliRunner().invoke(main, ["--out", str(tmp_path), *small, "--json"], catch_exceptions=False)
        assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert [run["options"]["recipe"] for run in found["runs"]] == ["mobilesam-2026", "nanosam"]
    assert all(run["steps"] == 2 for run in found["runs"])
    assert all(seconds > 0 for seconds in found["step_seconds"].values())


def test_every_part_differs_from_our_recipe() -> None:
    assert len({*PARTS.values(), RECIPES["mobilesam-2026"]}) == len(PARTS) + 1
