from __future__ import annotations

import os
from pathlib import Path

import pytest

from mobilesam.predict import PredictError
from mobilesam.predict.outputs import Outputs, check_file


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to("real.png")
    check_file(tmp_path / "link.png", "--out")
    with Outputs() as outputs:
        outputs.add(tmp_path / "link.png", b"new", "--out")
        outputs.commit()
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").read_bytes() == b"new"


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
            check_file(path, "--rle")
        assert str(raised.value).startswith("--rle")
        assert len(str(raised.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe.png"]
