from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mobilesam.predict import ExportConfig, PredictError, SegmentConfig, export


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


POINT = {"points": [(3, 4)]}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "nothing to segment"),
        (POINT | {"image_size": 1000}, "--image-size 1000"),
        (POINT | {"image_size": 48}, "--image-size 48"),
        (POINT | {"image_size": 10**9}, "--image-size 1000000000"),
        (POINT | {"out": "overlay.gif"}, "overlay.gif is neither PNG nor JPEG"),
        (POINT | {"out": "overlay"}, "neither PNG nor JPEG"),
        (POINT | {"student": "a", "teacher": "vit_b"}, "one of them"),
        (POINT | {"checkpoint": "a.pth"}, "give --teacher"),
        (POINT | {"teacher": "vit_b", "head": "store.zarr"}, "has its own"),
        (POINT | {"out": "photo.png"}, "--out photo.png is the image itself"),
        (POINT | {"rle": "sub/../photo.png"}, "is the image itself"),
        (POINT | {"student": "s.png", "out": "s.png"}, "is --student itself"),
        (POINT | {"out": "x.png", "rle": "x.png"}, "is --out itself"),
        (POINT | {"out": "masks/x.png", "masks": "masks"}, "is in --masks masks"),
        (POINT | {"rle": "masks/x.json", "masks": "masks/"}, "is in --masks masks"),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_numbers(options: dict[str, Any], told: str) -> None:
    with pytest.raises(PredictError) as raised:
        SegmentConfig(image=Path("photo.png"), **options)
    assert told in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
