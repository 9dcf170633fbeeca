from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from mobilesam.distill.labels import Labels, to_square_mask
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


def test_a_mask_is_set_where_at_least_half_of_a_pixel_is():
    rng = np.random.default_rng(0)
    mask = rng.random((60, 90)) < 0.5
    found = to_square_mask(mask, 30)  # 3 x 3 pixels of the image make one
    for y in range(30):
        for x in range(30):
            share = mask[3 * y : 3 * y + 3, 3 * x : 3 * x + 3].sum() / 9 if y < 20 else 0
            assert found[y, x] == (share > 0.5), (y, x)


def test_the_square_is_the_encoders_image_at_the_top_left():
    mask = np.zeros((100, 200), bool)
    mask[:, 100:] = True
    found = to_square_mask(mask, 32)
    image = Image.fromarray(mask).resize((32, 16), Image.Resampling.NEAREST)
    assert np.array_equal(found[:16], np.asarray(image))
    assert not found[16:].any()


def test_objects_are_drawn_without_repetition_others_in_every_epoch_the_same_by_seed(tmp_path: Path):
    masks = [np.zeros((64, 64), bool) for _ in range(6)]
    for i, mask in enumerate(masks):
        mask[8 * i : 8 * i + 8] = True
    write(tmp_path, 3, masks)
    labels = Labels(tmp_path, 64, objects=4, seed=0)
    epochs = [labels.draw(record(3, (64, 64)), epoch) for epoch in range(6)]
    assert all(drawn is not None and drawn.shape == (4, 32, 32) for drawn in epochs)
    assert all(drawn.sum(axis=0).max() == 1 for drawn in epochs)
    assert any(not np.array_equal(epochs[0], drawn) for drawn in epochs[1:])
    again = Labels(tmp_path, 64, objects=4, seed=0).draw(record(3, (64, 64)), 2)
    assert np.array_equal(epochs[2], again)


def test_fewer_objects_are_all_there_and_those_too_small_to_be_seen_are_not(tmp_path: Path):
    speck, large = np.zeros((2, 640, 640), bool)
    speck[5, 5] = True
    large[100:500, 100:500] = True
    write(tmp_path, 0, [speck, large])
    drawn = Labels(tmp_path, 64, objects=8, seed=0).draw(record(0, (640, 640)), 0)
    assert drawn is not None
    assert drawn.shape == (1, 32, 32)
    assert drawn.sum() == 20 * 20


def test_no_file_means_no_annotations_and_a_broken_one_no_objects_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    labels = Labels(tmp_path, 64, objects=8, seed=0)
    assert labels.draw(record(0, (64, 64)), 0) is None
    write(tmp_path, 1, [np.ones((60, 64), bool)])  # of another image
    for epoch in range(2):
        drawn = labels.draw(record(1, (64, 64)), epoch)
        assert drawn is not None
        assert drawn.shape == (0, 32, 32)
    assert labels.broken == {"1.png"}
    assert [line.message.startswith("1.png: ") for line in caplog.records] == [True]
