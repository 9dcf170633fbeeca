from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_the_command_prints_a_table_or_one_object(labelled: Any, run: Callable[..., Any]) -> None:
    arguments = ("--store", "store.zarr", "--model", "mine=runs/latest", "--model", "nano=vit_nano", "--points", 1,
                 "--distances", "20,300", "--limit", 1)  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "1 of 1 image, split val"
    titles = [
        "Cost on this machine",
        "mIoU with vit_nano's masks, 1 x 1 points in 1 image",
        "mIoU with labels, 3 objects",
    ]
    for title in titles:
        at = next(i for i, line in enumerate(lines) if line.startswith(title))
        assert [line.split()[0] for line in lines[at + 1 : at + 4]] == ["model", "mine", "nano"]
    assert "1 of 2 pairs don't fit" in result.stdout
    as_json = json.loads(run(*arguments, "--json").stdout)
    assert [model["name"] for model in as_json["models"]] == ["mine", "nano"]


def test_nothing_to_compare_exits_3_and_says_what_to_give(run: Callable[..., Any]) -> None:
    result = run("--images", "photos-0", "--model", "nano=vit_nano", "--image-size", 64)
    assert result.exit_code == 3
    assert "give --store, --teacher, or labels" in result.stdout
    for photo in Path("photos-0").iterdir():
        photo.with_suffix(".json").write_text("[]")
    result = run("--images", "photos-0", "--model", "nano=vit_nano", "--image-size", 64, "--json")
    assert result.exit_code == 3
    assert len(json.loads(result.stdout)["failed"]) == 6


def test_wrong_use_exits_2(run: Callable[..., Any]) -> None:
    for arguments, message in (
        (("--store", "store.zarr"), "--model NAME=FILE"),
        (("--store", "store.zarr", "--model", "runs/latest"), "give NAME=FILE"),
        (("--store", "s", "--model", "a=b", "--distances", "1,x"), "--distances '1,x'"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
