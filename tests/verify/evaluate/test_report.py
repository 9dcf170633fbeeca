from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mobilesam.distill import build_student, save_student
from mobilesam.verify import EvaluateConfig, ReportError, VerifyError, evaluate_masks, evaluation_lines


def test_the_report_shows_everybodys_masks_and_needs_nothing_else(
    labelled: Any, run: Callable[..., Any], tmp_path: Path
) -> None:
    for photo in labelled.photos.glob("*.bmp"):
        if photo.name == "photo2.bmp":
            photo.with_suffix(".json").write_text("{")
    save_student(
        build_student("deit_tiny", 64, seed=0),
        tmp_path / "s.safetensors",
        "deit_tiny",
        64,
        {"teacher": "<b>&"},
    )
    result = run(
        "--store", "store.zarr", "--model", "mine=runs/latest", "--model", f"<i>deit={tmp_path / 's.safetensors'}",
        "--split", "all", "--limit", 4, "--points", 1, "--distances", "none", "--report", "report.html", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    page = Path("report.html").read_text()
    assert "<i>deit" not in page
    assert "&lt;i&gt;deit" in page
    assert "photo2.bmp" in page
    # Three images have two strips each: the teacher's or the labels, and each model's; and a photo.
    assert page.count('<img src="data:image/jpeg;base64,') == 3 * (1 + 2 * 3)
    assert "http" not in page.replace("http-equiv", "")
    figures = json.loads(result.stdout)["models"][0]["teacher"]["point"]["miou"]
    assert f"{figures:.4f}" in page


def test_a_report_that_cannot_be_written_is_refused_before_any_work(world: Any) -> None:
    config = EvaluateConfig(
        models=(("a", "nowhere"),), store=world.store, report=world.path / "gone" / "report.html"
    )
    with pytest.raises(VerifyError, match=r"its folder .* does not exist"):
        evaluate_masks(config)


def test_what_was_found_outlives_photos_that_go_away_before_the_report(world: Any) -> None:
    options = {"models": (("a", "vit_nano"),), "images": world.photos, "teacher": "vit_nano", "points": 1}

    def last(done: int, total: int) -> None:
        if done == total:
            shutil.rmtree(world.photos)

    whole = evaluate_masks(EvaluateConfig(**options))
    with pytest.raises(ReportError, match=r"no report: photo\d\.bmp: the file is missing") as caught:
        evaluate_masks(EvaluateConfig(**options, report=world.path / "report.html"), progress=last)
    kept = caught.value.result
    assert kept["report"] is None
    assert kept["models"][0]["teacher"] == whole["models"][0]["teacher"]
    assert kept["per_image"] == whole["per_image"]
    assert not (world.path / "report.html").exists()
    assert not any("report" in line for line in evaluation_lines(kept))
