"""The three commands with the official teachers, at the full size, as processes of their own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from official_checkpoints import write_checkpoint

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"


@pytest.mark.long
@pytest.mark.parametrize("teacher", ["vit_b", "vit_h"])
def test_the_three_commands_work_with_an_official_checkpoint(teacher: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / f"{teacher}.pth"
    write_checkpoint(teacher, checkpoint)
    (tmp_path / "photos").mkdir()
    for name in ("cat.png", "rocket.jpg"):
        shutil.copy(PHOTOS / name, tmp_path / "photos")

    def run(*arguments: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-m", "mobilesam", *arguments, "--json"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    embedded = run(
        "precompute", "--images", "photos", "--out", "store.zarr", "--teacher", teacher,
        "--checkpoint", str(checkpoint),
    )  # fmt: skip
    assert (embedded["done"], embedded["failed"]) == (2, 0)
    assert run("distill", "--epochs", "1")["steps"] == 1
    assert run("verify")["images"] == 1
