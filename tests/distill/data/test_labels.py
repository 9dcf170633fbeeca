from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from mobilesam.distill.data.labels import AnnotationLabels, to_square_mask
from mobilesam.sam import AnnotationFiles
from mobilesam.store import ImageRecord


def record(row: int, size: tuple[int, int]) -> ImageRecord:
    fields = dict.fromkeys(ImageRecord.__dataclass_fields__)
    return ImageRecord(**{**fields, "row": row, "key": f"{row}.png", "original_size": size})


def write(folder: Path, row: int, masks: list[np.ndarray]) -> None:
    height, width = masks[0].shape
    objects = []
    for mask in masks:
        rle = coco.encode(np.asfortranarray(mask, np.uint8))
        objects.append(
            {
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
                "bbox": [float(value) for value in coco.toBbox(rle)],
                "area": int(mask.sum()),
            }
        )
    about = {"image_id": row, "width": width, "height": height, "file_name": f"{row}.png"}
    (folder / f"{row}.json").write_text(json.dumps({"image": about, "annotations": objects}))


def test_a_pixel_of_a_square_mask_is_set_where_at_least_half_of_it_is_covered():
    rng = np.random.default_rng(0)
    mask = rng.random((60, 90)) < 0.5
    found = to_square_mask(mask, 30)  # 3 x 3 pixels of the image make one
    for y in range(30):
        for x in range(30):
            share = mask[3 * y : 3 * y + 3, 3 * x : 3 * x + 3].sum() / 9 if y < 20 else 0
            assert found[y, x] == (share > 0.5), (y, x)


def test_a_mask_lies_in_the_top_left_corner_of_the_square_as_its_image_does():
    mask = np.zeros((100, 200), bool)
    mask[:, 100:] = True
    found = to_square_mask(mask, 32)
    image = Image.fromarray(mask).resize((32, 16), Image.Resampling.NEAREST)
    assert np.array_equal(found[:16], np.asarray(image))
    assert not found[16:].any()


def test_objects_are_drawn_without_repetition_differently_by_epoch_and_reproducibly_by_seed(tmp_path: Path):
    masks = [np.zeros((64, 64), bool) for _ in range(6)]
    for i, mask in enumerate(masks):
        mask[8 * i : 8 * i + 8] = True
    write(tmp_path, 3, masks)
    labels = AnnotationLabels(AnnotationFiles(tmp_path), 64, objects=4, seed=0)
    epochs = [labels.draw(record(3, (64, 64)), epoch) for epoch in range(6)]
    assert all(drawn is not None and drawn.shape == (4, 32, 32) for drawn in epochs)
    assert all(drawn.sum(axis=0).max() == 1 for drawn in epochs)
    assert any(not np.array_equal(epochs[0], drawn) for drawn in epochs[1:])
    again = AnnotationLabels(AnnotationFiles(tmp_path), 64, objects=4, seed=0).draw(record(3, (64, 64)), 2)
    assert np.array_equal(epochs[2], again)


def test_an_image_with_few_objects_gives_all_but_those_smaller_than_a_pixel(tmp_path: Path):
    speck, large = np.zeros((2, 640, 640), bool)
    speck[5, 5] = True
    large[100:500, 100:500] = True
    write(tmp_path, 0, [speck, large])
    drawn = AnnotationLabels(AnnotationFiles(tmp_path), 64, objects=8, seed=0).draw(record(0, (640, 640)), 0)
    assert drawn is not None
    assert drawn.shape == (1, 32, 32)
    assert drawn.sum() == 20 * 20


def test_a_missing_file_means_no_annotations_and_a_broken_one_no_objects_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    labels = AnnotationLabels(AnnotationFiles(tmp_path), 64, objects=8, seed=0)
    assert labels.draw(record(0, (64, 64)), 0) is None
    write(tmp_path, 1, [np.ones((60, 64), bool)])  # of another image
    for epoch in range(2):
        drawn = labels.draw(record(1, (64, 64)), epoch)
        assert drawn is not None
        assert drawn.shape == (0, 32, 32)
    assert list(labels.broken) == ["1.png"]
    assert [line.message.startswith("1.png: ") for line in caplog.records] == [True]


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 300), (300, 1), (37, 211), (211, 37), (64, 65), (31, 2000), (500, 333)]
)
def test_resizing_only_the_images_part_gives_the_same_as_resizing_the_square(size: tuple[int, int]):
    mask = np.random.default_rng(0).random(size) < 0.5
    longest = max(size)
    square = np.zeros((longest, longest), np.uint8)
    square[: size[0], : size[1]] = mask * np.uint8(255)
    wanted = np.asarray(Image.fromarray(square).resize((32, 32), Image.Resampling.BOX)) >= 128
    assert np.array_equal(to_square_mask(mask, 32), wanted)


def test_a_panoramas_mask_is_resized_without_a_square_of_its_length():
    mask = np.ones((4, 300_000), bool)  # the square would be 90 GB
    assert to_square_mask(mask, 32).shape == (32, 32)


def test_annotations_that_could_not_be_read_are_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path, 1, [np.ones((64, 64), bool)])
    labels = AnnotationLabels(AnnotationFiles(tmp_path), 64, objects=8, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr("os.pread", _too_many_files)
        for _ in range(2):
            drawn = labels.draw(record(1, (64, 64)), 0)
            assert drawn is not None
            assert len(drawn) == 0
    assert len(caplog.records) == 1
    again = labels.draw(record(1, (64, 64)), 0)
    assert again is not None
    assert len(again) == 1


def _too_many_files(*_: object) -> bytes:
    raise OSError(24, "Too many open files")


def test_annotations_without_an_object_are_listed_as_empty(tmp_path: Path):
    about = {"image_id": 0, "width": 64, "height": 64, "file_name": "0.png"}
    (tmp_path / "0.json").write_text(json.dumps({"image": about, "annotations": []}))
    labels = AnnotationLabels(AnnotationFiles(tmp_path), 64, objects=8, seed=0)
    drawn = labels.draw(record(0, (64, 64)), 0)
    assert drawn is not None
    assert labels.empty == {"0.png"}
    assert not labels.broken


def test_labels_of_a_photo_that_exif_turns_name_that_as_the_reason(tmp_path: Path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (64, 60)).save(tmp_path / "0.png", exif=exif)
    write(tmp_path, 0, [np.ones((60, 64), bool)])
    labels = AnnotationLabels(AnnotationFiles(tmp_path), 64, objects=8, seed=0, image_root=tmp_path)
    labels.draw(record(0, (64, 60)), 0)
    assert "its EXIF orientation (6) turns it" in labels.broken["0.png"]


def test_objects_that_cannot_be_used_are_counted_once_by_reason(tmp_path: Path):
    write(tmp_path, 0, [np.ones((64, 64), bool), np.ones((64, 64), bool)])
    content = json.loads((tmp_path / "0.json").read_text())
    content["annotations"][0]["segmentation"] = []
    (tmp_path / "0.json").write_text(json.dumps(content))
    labels = AnnotationLabels(AnnotationFiles(tmp_path), 64, objects=8, seed=0)
    for epoch in range(3):
        drawn = labels.draw(record(0, (64, 64)), epoch)
        assert drawn is not None
        assert len(drawn) == 1
    assert labels.to_json() == {"empty": 0, "broken": 0, "objects": 1, "left_out": {"no outline": 1}}
