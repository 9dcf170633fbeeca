from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from mobilesam.common.outputs import read_mark
from mobilesam.distill import load_student
from mobilesam.predict import ExportConfig, PredictError, export, load_model
from mobilesam.predict.export import bundle
from mobilesam.sam import preprocessing_recipe

FILES = {"model.pt", "model.safetensors", "model.json", "encoder.onnx", "decoder.onnx", "README.md"}


@pytest.mark.usefixtures("_quick_onnx")
def test_a_folder_has_every_file_and_their_digests(run: Path, tmp_path: Path) -> None:
    result = export(ExportConfig(student=run, out=tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES == result["files"].keys()
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    assert described["files"].keys() == FILES - {"model.json"}
    for name, known in {**described["files"], **result["files"]}.items():
        data = (tmp_path / "out" / name).read_bytes()
        assert known == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert described["preprocessing"] == preprocessing_recipe(64)
    assert described["student"] == "tiny_vit"
    assert described["teacher"] == {"name": "vit_nano", "checkpoint_sha256": "0" * 64}
    assert result["left_out"] == {}


@pytest.mark.usefixtures("_quick_onnx")
def test_a_folder_tells_the_runs_data_and_last_metrics(run: Path, tmp_path: Path) -> None:
    from mobilesam.distill import Run

    export(ExportConfig(student=run, out=tmp_path / "out"))
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    opened = Run.open(run)
    assert described["data"] == {
        "images_trained": len(opened.split.train),
        "images_held_out": len(opened.split.val),
        "store_id": opened.description.data.store_id,
    }
    result = opened.result()
    assert result is not None
    assert {name: described["metrics"][name] for name in result["val"]} == result["val"]


@pytest.mark.usefixtures("_quick_onnx")
def test_a_run_with_damaged_metrics_is_exported_without_them(run: Path, tmp_path: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(lines.replace(b"mse", b"mxe", 1))
    result = export(ExportConfig(student=run, out=tmp_path / "out"))
    assert any("metrics were left out" in warning for warning in result["warnings"])
    assert json.loads((tmp_path / "out" / "model.json").read_text())["metrics"] is None


@pytest.mark.usefixtures("_quick_onnx")
def test_a_folder_loads_as_the_run_did_and_so_does_its_own_export(run: Path, tmp_path: Path) -> None:
    export(ExportConfig(student=run, out=tmp_path / "out"))
    export(ExportConfig(student=tmp_path / "out", out=tmp_path / "again"))
    original = load_model(run)
    for folder in (tmp_path / "out", tmp_path / "again"):
        model = load_model(folder)
        assert model.info["run_id"] == original.info["run_id"]
        assert load_student(folder)[1]["student"] == "tiny_vit"
        state = model.sam.state_dict()
        assert all(torch.equal(state[key], value) for key, value in original.sam.state_dict().items())
    first, second = (json.loads((tmp_path / name / "model.json").read_text()) for name in ("out", "again"))
    for key in ("metrics", "data", "teacher", "run", "epoch"):
        assert first[key] == second[key], key


@pytest.mark.usefixtures("_quick_onnx")
def test_a_student_that_upstream_lacks_leaves_the_pt_out_and_says_why(toy: Path, tmp_path: Path) -> None:
    result = export(ExportConfig(student=toy, out=tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"model.pt"}
    assert "no class for toy" in result["left_out"]["model.pt"]
    assert "There is no `model.pt`" in (tmp_path / "out" / "README.md").read_text()
    assert load_model(tmp_path / "out").student == "toy"


@pytest.mark.usefixtures("_quick_onnx")
def test_a_new_export_replaces_an_older_one_and_what_a_kill_left(
    run: Path, toy: Path, tmp_path: Path
) -> None:
    export(ExportConfig(student=run, out=tmp_path / "out"))
    (tmp_path / "out" / ".0123abcd.partial").write_bytes(b"half")
    export(ExportConfig(student=toy, out=tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"model.pt"}
    assert load_model(tmp_path / "out").student == "toy"


@pytest.mark.usefixtures("_quick_onnx")
def test_a_folder_of_something_else_is_refused_and_left_as_it_was(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my project")
    with pytest.raises(PredictError, match=r"README\.md"):
        export(ExportConfig(student=run, out=tmp_path / "mine"))
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["my project"]
    export(ExportConfig(student=run, out=tmp_path / "out"))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(PredictError, match=r"1 file.*notes\.txt"):
        export(ExportConfig(student=run, out=tmp_path / "out"))
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.usefixtures("_quick_onnx")
def test_a_runs_own_folder_is_refused(run: Path, toy: Path) -> None:
    before = {path.name for path in run.iterdir()}
    for student, told in ((run, "is --student itself"), (toy, "give a new folder")):
        with pytest.raises(PredictError, match=told):
            export(ExportConfig(student=student, out=run))
    assert {path.name for path in run.iterdir()} == before


@pytest.mark.usefixtures("_quick_onnx")
@pytest.mark.parametrize("name", sorted(FILES - {"model.json"}))
def test_a_file_of_an_export_that_was_edited_since_is_not_replaced(
    name: str, run: Path, tmp_path: Path
) -> None:
    export(ExportConfig(student=run, out=tmp_path / "out"))
    with open(tmp_path / "out" / name, "ab") as file:
        file.write(b"\nMy own words.\n")
    before = (tmp_path / "out" / name).read_bytes()
    with pytest.raises(PredictError, match=rf"{name}.* was changed since mobilesam exported it"):
        export(ExportConfig(student=run, out=tmp_path / "out"))
    assert (tmp_path / "out" / name).read_bytes() == before
    (tmp_path / "out" / name).unlink()
    export(ExportConfig(student=run, out=tmp_path / "out"))


@pytest.mark.usefixtures("_quick_onnx")
def test_an_export_of_a_version_without_marks_is_replaced_unless_it_was_edited(
    run: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bundle, "marked", lambda data, _: data)
        export(ExportConfig(student=run, out=tmp_path / "out"))
    assert all(read_mark(path) is None for path in (tmp_path / "out").iterdir())
    card = (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "out" / "README.md").write_text(card + "My own words.")
    with pytest.raises(PredictError, match=r"README\.md was changed since"):
        export(ExportConfig(student=toy, out=tmp_path / "out"))
    (tmp_path / "out" / "README.md").write_text(card)
    export(ExportConfig(student=toy, out=tmp_path / "out"))
    assert load_model(tmp_path / "out").student == "toy"
