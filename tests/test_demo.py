"""`make demo`: its pictures, and its commands from end to end with a few of them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
HELD_OUT = {"cat", "coffee", "raccoon"}


def _write_pictures(out: Path) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo_pictures.py", "--out", out, "--generated", "21", "--crops", "19"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_photos_held_out_are_in_no_training_picture_and_a_rerun_keeps_all(tmp_path: Path) -> None:
    words = _write_pictures(tmp_path)
    assert words == f"40 pictures to learn from, 60 held out, in {tmp_path}\n"
    train, held_out = tmp_path / "train", tmp_path / "held-out"
    assert len(list((train / "generated").glob("*.jpg"))) == 21
    crops = {path.stem.rpartition("-")[0] for path in (train / "photos").iterdir()}
    assert len(crops) == 9
    assert not crops & HELD_OUT
    judged = [path for path in held_out.rglob("*") if path.suffix in {".jpg", ".png"}]
    assert len(judged) == 60
    assert {path.stem.partition("-")[0] for path in (held_out / "photos").iterdir()} == HELD_OUT
    for path in judged:
        with Image.open(path) as picture:
            assert max(picture.size) <= 256 or path.stem in HELD_OUT
    before = {path: path.stat().st_mtime_ns for path in train.rglob("*.*")}
    _write_pictures(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in train.rglob("*.*")} == before


@pytest.mark.long
def test_its_commands_run_to_the_report_and_the_readmes_picture(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["make", "-n", "demo", "DEMO=demo"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    commands = [
        shlex.split(line)[4:]
        for line in listed.stdout.splitlines()
        if line.startswith("cd demo && ../.venv/bin/mobilesam")
    ]
    assert [command[0] for command in commands] == [
        "precompute",
        "precompute",
        "distill",
        "verify",
        "segment",
    ]
    (tmp_path / "demo").mkdir()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    _write_pictures(tmp_path / "demo" / "pictures")
    for command in commands:
        subprocess.run(
            [sys.executable, "-m", "mobilesam", *command],
            check=True, cwd=tmp_path / "demo", env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    with Image.open(tmp_path / "demo" / "segment.png") as overlay:
        assert overlay.size == (600, 400)
    subprocess.run(
        [sys.executable, ROOT / "examples" / "readme_picture.py", "--student", "runs/latest", "--out", "readme.jpg"],
        check=True, cwd=tmp_path / "demo",
    )  # fmt: skip
    with Image.open(tmp_path / "demo" / "readme.jpg") as picture:
        assert picture.width > picture.height > 1000
