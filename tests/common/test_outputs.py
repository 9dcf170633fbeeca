"""Marks of output files: recognised in every format, unless a byte was changed since."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from mobilesam.common.errors import PredictError
from mobilesam.common.outputs import marked, place_output, read_mark, refuse_foreign, write_output

KIND = "verify report"
PAGE = b'<!DOCTYPE html>\n<html lang="en">\n<head>\n<title>x</title></head></html>\n'


def _picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(75, dtype=np.uint8).reshape(5, 5, 3)).save(buffer, kind)
    return buffer.getvalue()


def _torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(5.0)}, buffer)
    return buffer.getvalue()


def _onnx_file() -> bytes:
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph)
    onnx.helper.set_model_props(model, {"format": "f"})
    return model.SerializeToString()


CONTENTS = {
    "png": lambda: _picture("PNG"),
    "jpg": lambda: _picture("JPEG"),
    "pt": _torch_file,
    "onnx": _onnx_file,
    "json": lambda: json.dumps({"a": 1}, indent=1).encode(),
    "html": lambda: PAGE,
    "md": lambda: b"# A card\n\nText.\n",
}


@pytest.mark.parametrize("suffix", CONTENTS)
def test_a_marked_file_is_known_and_with_any_byte_changed_it_is_not(suffix: str, tmp_path: Path) -> None:
    data = CONTENTS[suffix]()
    content = marked(data, KIND)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(data)
    assert read_mark(path) is None
    path.write_bytes(content)
    mark = read_mark(path)
    assert mark is not None
    assert (mark.kind, mark.intact) == (KIND, True)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        mark = read_mark(path)
        assert mark is None or mark.kind != KIND or not mark.intact, place
    path.write_bytes(content + b"\n")
    mark = read_mark(path)
    assert mark is None or not mark.intact


def test_formats_own_readers_see_the_mark_where_it_belongs(tmp_path: Path) -> None:
    for suffix, make in CONTENTS.items():
        (tmp_path / f"x.{suffix}").write_bytes(marked(make(), KIND))
    for suffix, key in (("png", "Comment"), ("jpg", "comment")):
        with (
            Image.open(tmp_path / f"x.{suffix}") as found,
            Image.open(io.BytesIO(CONTENTS[suffix]())) as wanted,
        ):
            np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
            assert KIND in str(found.info[key])
    for options in ({}, {"mmap": True}):
        assert torch.load(tmp_path / "x.pt", weights_only=True, **options)["a"].tolist() == [0, 1, 2, 3, 4]
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
    model = onnx.load(tmp_path / "x.onnx")
    onnx.checker.check_model(model)
    assert [prop.key for prop in model.metadata_props] == ["format", "mobilesam"]
    assert list(json.loads((tmp_path / "x.json").read_bytes())) == ["software", "a"]
    assert b'<head>\n<meta name="generator" content="mobilesam' in (tmp_path / "x.html").read_bytes()


@pytest.mark.parametrize("content", [b"", b"x", b"mine", _picture("PNG"), PAGE, b"{}"])
def test_another_file_is_refused_in_one_line_that_names_the_mend(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.html"
    refuse_foreign(path, KIND, "--report", PredictError)
    path.write_bytes(content)
    with pytest.raises(
        PredictError,
        match=r"^--report .*mine.html exists and is no verify report of mobilesam.*another name, or del",
    ) as e:
        refuse_foreign(path, KIND, "--report", PredictError)
    assert "\n" not in str(e.value)
    refuse_foreign(path, KIND, "--report", PredictError, is_older=lambda _: True)


def test_an_output_of_another_kind_or_changed_since_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_bytes(marked(PAGE, "sweep report"))
    with pytest.raises(PredictError, match="exists and is no verify report, but mobilesam's sweep report"):
        refuse_foreign(path, KIND, "--report", PredictError)
    path.write_bytes(marked(PAGE, KIND) + b"<!-- my notes -->")
    with pytest.raises(PredictError, match="was changed since"):
        refuse_foreign(path, KIND, "--report", PredictError, is_older=lambda _: True)


def test_a_file_without_hard_links_is_placed_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    (tmp_path / "partial").write_text("new")
    place_output(tmp_path / "partial", tmp_path / "final", lambda: None)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"final": "new"}


def test_an_output_never_replaces_a_file_that_appeared_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("mine")
    with pytest.raises(PredictError, match="exists and is no verify report"):
        write_output(path, PAGE, KIND, lambda: refuse_foreign(path, KIND, "--report", PredictError))
    assert {place.name: place.read_text() for place in tmp_path.iterdir()} == {"page.html": "mine"}
