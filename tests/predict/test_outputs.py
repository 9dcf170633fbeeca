from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mobilesam.common.outputs import marked
from mobilesam.predict import PredictError
from mobilesam.predict.outputs import RLE, Outputs, check_file


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_bytes(marked(b'{"old": 1}', RLE))
    (tmp_path / "link.json").symlink_to("real.json")
    check_file(tmp_path / "link.json", "--rle", RLE)
    with Outputs() as outputs:
        outputs.add(tmp_path / "link.json", b'{"new": 1}', "--rle", RLE)
        outputs.commit()
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_bytes())["new"] == 1


def test_a_file_that_appears_while_the_work_is_done_is_left_alone(tmp_path: Path) -> None:
    for place in (tmp_path / "a.json", tmp_path / "b.json"):
        check_file(place, "--rle", RLE)
    with Outputs() as outputs:
        for place in (tmp_path / "a.json", tmp_path / "b.json"):
            outputs.add(place, b'{"new": 1}', "--rle", RLE)
        (tmp_path / "b.json").write_text("mine")
        with pytest.raises(PredictError, match=r"--rle .*b\.json exists and is no segment rle file"):
            outputs.commit()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b.json": "mine"}


def test_what_cannot_be_written_is_refused_before_and_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "file").write_bytes(b"")
    refused = {
        tmp_path: "is a folder",
        tmp_path / "pipe.png": "not a regular file",
        Path("/dev/null"): "not a regular file",
        tmp_path / "none" / "x.png": "there is no folder",
        tmp_path / "file" / "x.png": "there is no folder",
        tmp_path / ("x" * 300): "can't be written",
        Path("/proc/x.png"): "can't be written",
    }
    for path, told in refused.items():
        with pytest.raises(PredictError, match=told) as raised:
            check_file(path, "--rle", RLE)
        assert str(raised.value).startswith("--rle")
        assert len(str(raised.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe.png"]
