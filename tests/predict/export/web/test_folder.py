"""Folder of the web demo: replaced as a whole, and never anything but an older demo."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from mobilesam.common.errors import PredictError
from mobilesam.common.outputs import marked
from mobilesam.predict.export.web.folder import (
    DESCRIPTION_FILE,
    FORMAT,
    check_demo_folder,
    read_demo,
    write_demo_folder,
)


def _content(text: str = "first", **more: bytes) -> dict[str, bytes]:
    files = {"index.html": b"<html>", "networks/encoder.onnx": text.encode(), **more}
    listing = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    description = {"format": FORMAT, "student": "toy", "listing": listing}
    return {**files, DESCRIPTION_FILE: marked(json.dumps(description).encode(), "export")}


def test_a_demo_replaces_an_older_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_demo_folder(tmp_path / "demo", _content(older=b"gone later"))
    write_demo_folder(tmp_path / "demo", _content("second"))
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert (tmp_path / "demo/networks/encoder.onnx").read_bytes() == b"second"
    assert not (tmp_path / "demo/older").exists()
    description = read_demo(tmp_path / "demo")
    assert description is not None
    assert description["student"] == "toy"


def test_an_empty_folder_and_a_link_to_a_demo_are_taken(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for text in ("first", "second"):
        check_demo_folder(tmp_path / "link")
        write_demo_folder(tmp_path / "link", _content(text))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/networks/encoder.onnx").read_bytes() == b"second"


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("notes.txt", "mine", "holds 1 file that no web demo has, such as notes.txt"),
        ("index.html", "<html>mine", r"index\.html was changed since mobilesam exported it"),
        ("demo.json", "{}", "that no web demo has"),
    ],
)
def test_files_of_others_and_changed_ones_stay(name: str, text: str, reason: str, tmp_path: Path) -> None:
    write_demo_folder(tmp_path / "demo", _content())
    (tmp_path / "demo" / name).write_text(text)
    with pytest.raises(PredictError, match=reason):
        check_demo_folder(tmp_path / "demo")
    with pytest.raises(PredictError, match=reason):
        write_demo_folder(tmp_path / "demo", _content("second"))
    assert (tmp_path / "demo" / name).read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_changed_demo_json_is_refused(tmp_path: Path) -> None:
    write_demo_folder(tmp_path / "demo", _content())
    path = tmp_path / "demo" / DESCRIPTION_FILE
    path.write_text(path.read_text().replace("toy", "boy"))
    with pytest.raises(PredictError, match=r"demo\.json was changed"):
        check_demo_folder(tmp_path / "demo")


def test_a_file_a_lost_link_and_a_missing_parent_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "lost").symlink_to("nowhere")
    for name, reason in (
        ("file", "is a file"),
        ("lost", "link to nothing"),
        ("no/demo", "there is no folder"),
    ):
        with pytest.raises(PredictError, match=reason):
            check_demo_folder(tmp_path / name)


def test_after_a_full_disk_the_older_demo_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demo_folder(tmp_path / "demo", _content())
    rename = os.rename

    def full(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(PredictError, match="No space left"):
        write_demo_folder(tmp_path / "demo", _content("second"))
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert (tmp_path / "demo/networks/encoder.onnx").read_bytes() == b"first"


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": "mobilesam web 1"}', '{"format": "other", "listing": {}}']
)
def test_other_json_describes_no_demo(text: str, tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION_FILE).write_text(text)
    assert read_demo(tmp_path) is None


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
def test_a_demo_that_lists_files_elsewhere_is_none(name: str, tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION_FILE).write_text(json.dumps({"format": FORMAT, "listing": {name: "0"}}))
    assert read_demo(tmp_path) is None
