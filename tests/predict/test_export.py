"""Export: what is asked for, what is refused, and the folder of everything."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lively import IMAGE_SIZE, ToyEncoder, save_lively

from mobilesam.distill import STUDENTS, load_student
from mobilesam.distill.students.registry import StudentInfo
from mobilesam.predict import ExportConfig, PredictError, export, load_model
from mobilesam.predict.export import bundle
from mobilesam.predict.export import run as exporter
from mobilesam.predict.export.onnx_graph import OnnxFile
from mobilesam.predict.export.run import export_lines
from mobilesam.sam import preprocessing_recipe

FILES = {"model.pt", "model.safetensors", "model.json", "encoder.onnx", "decoder.onnx", "README.md"}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student that upstream has no class for."""
    info = StudentInfo(name="toy", summary="one convolution", build=ToyEncoder)
    monkeypatch.setattr("mobilesam.distill.students.registry.STUDENTS", {**STUDENTS, "toy": info})
    return save_lively(tmp_path / "toy.safetensors", "toy")


@pytest.fixture
def _quick_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX files are made and checked in tests of their own; here it matters where they go."""
    made = OnnxFile(data=b"onnx", max_relative_difference=1e-6, limit=1e-4)
    for name in ("export_encoder", "export_decoder"):
        monkeypatch.setattr(bundle, name, lambda *_: made)
        monkeypatch.setattr(exporter, name, lambda *_: made)


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded for an export that can't be written")

    monkeypatch.setattr(exporter, "load_model", load)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mine.pt", "torch"),
        ("mine.PTH", "torch"),
        ("encoder.onnx", "encoder"),
        ("mine-encoder.onnx", "encoder"),
        ("my.decoder.onnx", "decoder"),
        ("folder", "folder"),
        ("a.b/folder", "folder"),
    ],
)
def test_the_name_tells_what_to_make(name: str, kind: str) -> None:
    assert ExportConfig(out=Path(name)).kind == kind


def test_a_folder_that_is_there_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "v1.2").mkdir()
    assert ExportConfig(out=tmp_path / "v1.2").kind == "folder"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mine.onnx", "encoder.onnx or in decoder.onnx"),
        ("encoder-mine.onnx", "encoder.onnx or in decoder.onnx"),
        ("mine.safetensors", ".pt, encoder.onnx or decoder.onnx"),
        ("mine.zip", "or a folder"),
    ],
)
def test_other_names_are_refused_with_the_rule(name: str, told: str) -> None:
    with pytest.raises(PredictError, match=re.escape(told)):
        export(ExportConfig(out=Path(name)))


def test_a_config_refuses_what_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(PredictError, match="--image-size 1000"):
        ExportConfig(out=Path("x"), image_size=1000)
    with pytest.raises(PredictError, match="--student itself"):
        ExportConfig(out=tmp_path / "x.pt", student=tmp_path / "x.pt")


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx", "folder"])
def test_without_the_onnx_tools_the_package_to_install_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(PredictError, match=r"onnxscript and onnxruntime.*'mobilesam\[export\]'"):
        export(ExportConfig(out=Path(name)))


def test_a_pt_needs_no_onnx(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    export(ExportConfig(student=run, out=tmp_path / "x.pt"))


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("name", ["no/x.pt", "no/encoder.onnx", "no/folder", "file/folder", "file", "link"])
def test_a_place_that_can_not_be_written_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(PredictError, match="--out"):
        export(ExportConfig(out=tmp_path / name))
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


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
    student = save_lively(tmp_path / "x.safetensors", **forged, metrics={}, data=["nothing"], epoch={})
    export(ExportConfig(student=student, out=tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<script>" not in card
    assert "\n# &lt;" not in card
    assert len(card) < 20_000


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
def test_a_runs_own_folder_is_refused(run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    with pytest.raises(PredictError, match="give a new folder"):
        export(ExportConfig(student=run, out=run))
    assert {path.name for path in run.iterdir()} == before


@pytest.mark.parametrize("name", ["encoder.onnx", "out"])
def test_an_onnx_file_that_computes_something_else_is_not_left(
    name: str, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilesam.predict.export.onnx_graph import Session

    right = Session.run
    monkeypatch.setattr(Session, "run", lambda *args: [value * 1.001 for value in right(*args)])
    with pytest.raises(PredictError, match=r"encoder\.onnx computes something else.*0\.001.*not written"):
        export(ExportConfig(student=toy, out=tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["toy.safetensors"]


@pytest.mark.usefixtures("_quick_onnx")
def test_a_file_that_is_there_stays_until_the_new_one_is_whole(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "encoder.onnx").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "export_encoder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(ExportConfig(student=toy, out=tmp_path / "encoder.onnx"))
    assert (tmp_path / "encoder.onnx").read_bytes() == b"old"
    export(ExportConfig(student=toy, out=tmp_path / "encoder.onnx"))
    assert (tmp_path / "encoder.onnx").read_bytes() == b"onnx"


@pytest.mark.usefixtures("_quick_onnx")
def test_people_are_told_what_was_made(run: Path, toy: Path, tmp_path: Path) -> None:
    lines = "\n".join(export_lines(export(ExportConfig(student=run, out=tmp_path / "out"))))
    assert (
        f"note: model.pt: MobileSAM's own code runs at 1024 pixels always; this student was trained at {IMAGE_SIZE}"
        in lines
    )
    assert re.search(r"encoder\.onnx +4 bytes  within 1\.0e-06 of torch", lines)
    assert "left out: MobileSAM" in "\n".join(
        export_lines(export(ExportConfig(student=toy, out=tmp_path / "t")))
    )


def test_the_result_is_plain_json(run: Path, tmp_path: Path) -> None:
    result: dict[str, Any] = export(ExportConfig(student=run, out=tmp_path / "x.pt"))
    assert json.loads(json.dumps(result)) == result
    assert result["teacher"] == "vit_nano"
