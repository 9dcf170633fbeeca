from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from random_student import save_random_student

from mobilesam.predict import ExportConfig, export


@pytest.mark.usefixtures("_quick_onnx")
def test_the_card_tells_what_is_known(run: Path, tmp_path: Path) -> None:
    export(ExportConfig(student=run, out=tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    assert "| teacher | vit_nano |" in card
    assert described["data"]["store_id"] in card
    assert f"| skill | {described['metrics']['skill_valid']:.4g} |" in card
    for name in ("model.pt", "model.safetensors", "encoder.onnx", "decoder.onnx"):
        assert f"`{name}`" in card
    assert "not recorded" not in card.replace("were not recorded", "")


@pytest.mark.usefixtures("_quick_onnx")
def test_what_a_plain_mobile_sam_pt_does_not_tell_is_said_to_be_not_recorded(
    mobile_sam_pt: Path, tmp_path: Path
) -> None:
    export(ExportConfig(student=mobile_sam_pt, out=tmp_path / "out", image_size=64))
    card = (tmp_path / "out" / "README.md").read_text()
    for name in ("teacher", "images trained on", "store", "trained for", "run"):
        assert f"| {name} | not recorded |" in card
    assert "metrics were not recorded" in card
    assert str(mobile_sam_pt.parent) not in card


@pytest.mark.usefixtures("_quick_onnx")
def test_names_in_a_students_file_do_no_harm_to_the_card(tmp_path: Path) -> None:
    forged: dict[str, Any] = {"teacher": "a | b\n# <script>`", "run": "r" * 5000, "init": [], "versions": "1"}
    student = save_random_student(
        tmp_path / "x.safetensors", **forged, metrics={}, data=["nothing"], epoch={}
    )
    export(ExportConfig(student=student, out=tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<script>" not in card
    assert "\n# &lt;" not in card
    assert len(card) < 20_000
