"""Export: what is asked for, what is refused, and the folder of everything."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from random_student import IMAGE_SIZE

from mobilesam.common.outputs import marked, read_mark
from mobilesam.predict import ExportConfig, PredictError, export
from mobilesam.predict.export import bundle
from mobilesam.predict.export import run as exporter
from mobilesam.predict.export.onnx_graph import STEPS, Begin, OnnxFile
from mobilesam.predict.export.run import export_lines

FILES = {"model.pt", "model.safetensors", "model.json", "encoder.onnx", "decoder.onnx", "README.md"}


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded for an export that can't be written")

    monkeypatch.setattr(exporter, "load_model", load)


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


@pytest.mark.parametrize("name", ["encoder.onnx", "out"])
def test_an_onnx_file_that_computes_something_else_is_not_left(
    name: str, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilesam.predict.export.onnx_graph import Session

    right = Session.run
    monkeypatch.setattr(Session, "run", lambda *args: [value * 1.001 for value in right(*args)])
    with pytest.raises(PredictError, match=r"encoder\.onnx differs from torch.*0\.001.*not written"):
        export(ExportConfig(student=toy, out=tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["toy.safetensors"]


@pytest.mark.usefixtures("_quick_onnx")
def test_a_file_that_is_there_stays_until_the_new_one_is_whole(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = marked(b"\x08\x0aold", "export")
    (tmp_path / "encoder.onnx").write_bytes(old)
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "export_encoder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(ExportConfig(student=toy, out=tmp_path / "encoder.onnx"))
    assert (tmp_path / "encoder.onnx").read_bytes() == old
    export(ExportConfig(student=toy, out=tmp_path / "encoder.onnx"))
    assert (tmp_path / "encoder.onnx").read_bytes().startswith(b"\x08\x0aonnx")


@pytest.mark.usefixtures("_quick_onnx")
def test_people_are_told_what_was_made(run: Path, toy: Path, tmp_path: Path) -> None:
    lines = "\n".join(export_lines(export(ExportConfig(student=run, out=tmp_path / "out"))))
    assert (
        f"note: model.pt: MobileSAM's own code always runs at 1024 pixels; this student was trained at {IMAGE_SIZE}"
        in lines
    )
    assert re.search(r"encoder\.onnx +1\d\d bytes  within 1\.0e-06 of torch", lines)
    assert "left out: MobileSAM" in "\n".join(
        export_lines(export(ExportConfig(student=toy, out=tmp_path / "t")))
    )


def test_an_onnx_file_is_replaced_unless_another_tool_changed_it(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExportConfig(student=toy, out=tmp_path / "encoder.onnx")
    with monkeypatch.context() as patch:
        patch.setattr("mobilesam.predict.outputs.marked", lambda data, _: data)
        export(config)
    assert read_mark(config.out) is None, "as a version without marks wrote it"
    export(config)
    model = onnx.load(config.out)
    model.ir_version = 9
    onnx.save(model, config.out)
    before = config.out.read_bytes()
    with pytest.raises(PredictError, match=r"encoder\.onnx was changed since mobilesam wrote it"):
        export(config)
    assert config.out.read_bytes() == before


@pytest.mark.usefixtures("_quick_onnx")
@pytest.mark.parametrize("name", ["out", "x.pt", "encoder.onnx", "decoder.onnx"])
def test_every_step_is_shown_in_order(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(_: object, __: str, begin: Begin) -> OnnxFile:
        for step in STEPS:
            begin(step)
        return OnnxFile(data=b"\x08\x0aonnx", max_relative_difference=1e-6, limit=1e-4)

    for place in (exporter, bundle):
        for maker in ("export_encoder", "export_decoder"):
            monkeypatch.setattr(place, maker, made)
    told: list[tuple[int, int, str]] = []
    export(ExportConfig(student=run, out=tmp_path / name), progress=lambda *step: told.append(step))
    count = {"out": 9, "x.pt": 2}.get(name, 5)
    assert [(number, total) for number, total, _ in told] == [(n, count) for n in range(1, count + 1)]
    assert told[0][2] == "loading the model"
    if name == "out":
        assert [text for *_, text in told[2:5]] == [f"encoder.onnx: {step}" for step in STEPS]


def test_the_result_is_plain_json(run: Path, tmp_path: Path) -> None:
    result: dict[str, Any] = export(ExportConfig(student=run, out=tmp_path / "x.pt"))
    assert json.loads(json.dumps(result)) == result
    assert result["teacher"] == "vit_nano"
