from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from mobilesam.predict import PredictError, SegmentConfig, segment
from mobilesam.predict.run import segment_lines
from mobilesam.sam import ImageError

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"


@pytest.fixture
def config(mobile_sam_pt: Path, small_photo: Path) -> Any:
    """config(...) -> one point on the small photo, at 64 pixels, unless told otherwise."""

    def make(**changes: Any) -> SegmentConfig:
        values = {"image": small_photo, "student": mobile_sam_pt, "image_size": 64, "device": "cpu"} | changes
        prompted = {"points", "boxes", "everything", "negative_points"} & values.keys()
        return SegmentConfig(**values, **({} if prompted else {"points": [(40, 30)]}))

    return make


def test_the_result_its_pictures_and_its_rle_say_the_same(config: Any) -> None:
    boxes = [(5, 5, 60, 50), (30, 10, 90, 60), (0, 0, 20, 60)]
    result = segment(config(boxes=boxes, masks="masks", rle="masks.json"))
    assert len(result["masks"]) == 3
    rle = json.loads(Path("masks.json").read_text())
    assert rle["image"] == {"width": 90, "height": 60, "file_name": "small.png"}
    for told, annotation in zip(result["masks"], rle["annotations"], strict=True):
        pixels = np.asarray(Image.open(told["file"])) == 255
        np.testing.assert_array_equal(coco.decode(annotation["segmentation"]) == 1, pixels)
        rows, columns = np.nonzero(pixels)
        assert told["area"] == annotation["area"] == len(rows) > 0
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert told["bbox"] == annotation["bbox"] == box
        assert told["predicted_iou"] == annotation["predicted_iou"]
        assert annotation["crop_box"] == [0, 0, 90, 60]
        assert annotation["point_coords"] == []
    assert Image.open(result["out"]).size == (90, 60)
    assert (result["out"], result["masks_dir"], result["rle"]) == ("overlay.png", "masks", "masks.json")


def test_several_boxes_give_what_each_gives_alone(config: Any) -> None:
    boxes = [(5, 5, 60, 50), (30, 10, 90, 60)]
    together = segment(config(boxes=boxes))["masks"]
    alone = [segment(config(boxes=[box]))["masks"][0] for box in boxes]
    assert together == alone
    assert alone[0]["area"] != alone[1]["area"]


def test_the_result_is_plain_json_with_the_documented_keys(config: Any) -> None:
    result = segment(config())
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result) == {
        *("image", "original_size", "student", "teacher", "model", "head", "image_size", "student_size"),
        *("device", "notes", "embedding_seconds", "mask_seconds", "masks", "out", "masks_dir", "rle"),
    }
    assert result["original_size"] == [60, 90]
    assert (result["student"], result["teacher"]) == ("tiny_vit", None)
    assert result["embedding_seconds"] > 0
    assert result["mask_seconds"] > 0
    assert (result["masks_dir"], result["rle"], result["masks"][0]["file"]) == (None, None, None)


def test_only_points_on_the_object_are_told_as_its_points(config: Any) -> None:
    segment(config(points=[(1, 2), (40, 30)], negative_points=[(80, 50)], rle="a.json"))
    (annotation,) = json.loads(Path("a.json").read_text())["annotations"]
    assert annotation["point_coords"] == [[1, 2], [40, 30]]


def test_coordinates_are_those_of_the_picture_as_it_is_seen(config: Any, small_photo: Path) -> None:
    """The same picture, once stored upright and once lying on its side with an EXIF orientation."""
    upright = Image.open(small_photo)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save("lying.png", exif=exif)
    found = [
        segment(config(image=image, points=[(80, 50)], masks=folder, out=f"{folder}.png"))
        for image, folder in ((small_photo, "first"), ("lying.png", "second"))
    ]
    assert found[1]["original_size"] == [60, 90]
    assert found[0]["masks"][0]["area"] == found[1]["masks"][0]["area"]
    for name in ("{}.png", "{}/000.png"):
        pictures = [np.asarray(Image.open(name.format(folder))) for folder in ("first", "second")]
        np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (2000, 20)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures_of_any_shape_are_segmented(config: Any, size: tuple[int, int], mode: str) -> None:
    Image.radial_gradient("L").resize(size).convert(mode).save("picture.png")
    result = segment(config(image="picture.png", points=[(size[0] - 1, 0)], masks="masks"))
    assert Image.open("overlay.png").size == Image.open("masks/000.png").size == size
    assert result["original_size"] == [size[1], size[0]]


def test_everything_on_a_model_that_finds_nothing_is_no_error(config: Any, tmp_path: Path) -> None:
    state = torch.load(config().student, weights_only=True)
    state["mask_decoder.iou_prediction_head.layers.2.bias"].fill_(-5)
    torch.save(state, tmp_path / "humble.pt")
    result = segment(config(student=tmp_path / "humble.pt", everything=True, masks="masks", rle="a.json"))
    assert result["masks"] == []
    assert list(Path("masks").iterdir()) == []
    assert json.loads(Path("a.json").read_text())["annotations"] == []
    assert "0 masks" in "\n".join(segment_lines(result))


def test_a_teacher_needs_no_student(config: Any) -> None:
    result = segment(config(student=None, teacher="vit_nano"))
    assert (result["student"], result["teacher"]) == (None, "vit_nano")
    assert "vit_nano at 64" in segment_lines(result)[0]


def test_a_run_tells_its_teacher(config: Any, run: Path) -> None:
    result = segment(config(student=run, image_size=None))
    assert (result["student"], result["teacher"]) == ("tiny_vit", "vit_nano")
    assert result["model"] == str(run / "student.safetensors")
    assert result["image_size"] == 64


def test_without_a_model_the_latest_run_is_meant(
    config: Any, finished_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match="no run at runs/latest"):
        segment(config(student=None, image_size=None))
    monkeypatch.chdir(finished_run.parents[1])
    result = segment(config(student=None, image_size=None, out=tmp_path / "out.png"))
    assert result["model"] == str(finished_run / "student.safetensors")


def test_the_lines_tell_times_masks_and_places(config: Any) -> None:
    result = segment(config(masks="masks", rle="a.json"))
    result["notes"] = ["something\nto know"]
    lines = segment_lines(result)
    text = "\n".join(lines)
    assert "small.png: 90 x 60 pixels, tiny_vit at 64 on cpu" in text
    assert "embedding " in text
    assert f"{result['masks'][0]['area']:,}" in text
    assert "note: something\\nto know" in lines
    assert [line.split() for line in lines[-3:]] == [
        ["overlay", "overlay.png"],
        ["masks", "masks"],
        ["RLE", "a.json"],
    ]
    result["masks"] *= 25
    assert "and 5 more" in segment_lines(result)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("missing.png", None, "missing.png: the file is missing"),
        ("empty.png", b"", "empty.png: the file is empty"),
        ("text.png", b"this is text", "text.png: not a JPEG"),
        ("cut.jpg", (PHOTOS / "coffee.jpg").read_bytes()[:5000], "cut.jpg: damaged or truncated"),
        (".", None, "not a regular file"),
        ("/dev/zero", None, "not a regular file"),
    ],
)
def test_an_image_that_cannot_be_used_is_one_line_and_nothing_is_written(
    config: Any, name: str, content: bytes | None, told: str, small_photo: Path
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(ImageError, match=told):
        segment(config(image=name, masks="masks", rle="a.json"))
    assert {path.name for path in Path().iterdir()} <= {name, small_photo.name}


def test_a_strip_that_would_vanish_is_refused(config: Any) -> None:
    Image.new("L", (2000, 1)).save("strip.png")
    with pytest.raises(ImageError, match=r"strip.png: too thin: 2000 x 1 pixels"):
        segment(config(image="strip.png", points=[(0, 0)]))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"out": "none/overlay.png"}, "--out: there is no folder"),
        ({"rle": "none/a.json"}, "--rle: there is no folder"),
        ({"masks": "none/masks"}, "--masks: there is no folder"),
        ({"masks": ".", "out": "../overlay.png"}, "--masks . holds 1 other files, such as small.png"),
        ({"points": [(90, 30)]}, "--point 90 30 is outside the image, which is 90 x 60 pixels"),
        ({"boxes": [(91, 0, 95, 30)]}, "--box 91 0 95 30 is outside the image"),
    ],
)
def test_what_can_be_refused_is_refused_before_a_model_is_loaded(
    config: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], told: str, small_photo: Path
) -> None:
    monkeypatch.setitem(segment.__globals__, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(PredictError, match=told):
        segment(config(**changes))
    assert [path.name for path in Path().iterdir()] == [small_photo.name]


def test_a_full_disk_leaves_what_was_there(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    segment(config(masks="masks", rle="a.json"))
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(PredictError, match=r"--rle: .*/a.json can't be written: No space left"):
        segment(config(points=[(10, 10)], masks="masks", rle="a.json"))
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_is_told_with_the_size(
    config: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def predict(*_: object) -> None:
        raise error

    monkeypatch.setitem(segment.__globals__, "predict", predict)
    with pytest.raises(PredictError, match="out of memory on cpu with an image of 90 x 60 pixels"):
        segment(config())
    assert not Path("overlay.png").exists()


def test_other_errors_are_not_taken_for_too_little_memory(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predict(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setitem(segment.__globals__, "predict", predict)
    with pytest.raises(RuntimeError, match="a bug"):
        segment(config())
