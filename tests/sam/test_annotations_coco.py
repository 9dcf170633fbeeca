from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco
from pycocotools.coco import COCO

from mobilesam.sam import AnnotationError, CocoInstances, annotations

HEIGHT, WIDTH = 24, 32
SQUARE = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
SQUARE[4:10, 5:15] = 1
COMPRESSED = {"size": [HEIGHT, WIDTH], "counts": coco.encode(SQUARE)["counts"].decode()}
RUNS = [5 * HEIGHT + 4, *[6, HEIGHT - 6] * 9, 6, HEIGHT * WIDTH - (14 * HEIGHT + 10)]


def image(id: int, file_name: str, **changes: Any) -> dict[str, Any]:
    return {"id": id, "file_name": file_name, "height": HEIGHT, "width": WIDTH, "license": 1, **changes}


def thing(id: int, image_id: int, segmentation: Any, **changes: Any) -> dict[str, Any]:
    box = [5.0, 4.0, 10.0, 6.0]
    return {
        "id": id, "image_id": image_id, "segmentation": segmentation, "bbox": box, "category_id": 1, "iscrowd": 0,
        "area": 60, **changes,
    }  # fmt: skip


def instances(**changes: Any) -> dict[str, Any]:
    triangle = [[2.5, 2.5, 20, 3, 10, 18], [24, 10, 30, 10, 30, 20, 24, 20]]
    crowd = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    return {
        "images": [image(11, "a.jpg"), image(12, "deep/b.jpg"), image(13, "c.jpg")],
        "annotations": [
            thing(1, 11, COMPRESSED),
            thing(2, 12, triangle, bbox=[2.5, 2.5, 27.5, 17.5]),
            thing(3, 11, {"size": [HEIGHT, WIDTH], "counts": RUNS}),
            thing(4, 11, crowd, iscrowd=1),
            thing(5, 99, COMPRESSED),
        ],
        "categories": [{"id": 1, "name": "thing"}],
        **changes,
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def write_content(content: Any) -> Path:
        path = tmp_path / "instances.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write_content


def test_masks_are_pycocotools_own_for_every_kind_of_segmentation(write: Callable[[Any], Path]) -> None:
    path = write(instances())
    ours, theirs = CocoInstances(path), COCO(path)
    for name, id in (("a.jpg", 11), ("deep/b.jpg", 12)):
        found = ours.read(name, size=(HEIGHT, WIDTH))
        wanted = theirs.loadAnns(theirs.getAnnIds(imgIds=[id], iscrowd=False))
        assert found is not None
        assert len(found) == len(wanted) > 0
        for index, each in enumerate(wanted):
            assert np.array_equal(found.mask(index), theirs.annToMask(each))
            x, y, width, height = each["bbox"]
            assert found.boxes_P4[index].tolist() == [x, y, x + width, y + height]
            assert found.areas_P[index] == theirs.annToMask(each).sum()


def test_crowds_are_left_out_and_images_without_objects_have_none(write: Callable[[Any], Path]) -> None:
    found = CocoInstances(write(instances())).read("a.jpg")
    assert found is not None
    assert found.areas_P.tolist() == [60, 60]
    empty = CocoInstances(write(instances())).read("c.jpg")
    assert empty is not None
    assert len(empty) == 0
    assert empty.boxes_P4.shape == (0, 4)


def test_images_are_matched_by_name_then_by_an_unambiguous_base_name(write: Callable[[Any], Path]) -> None:
    images = [image(11, "a.jpg"), image(12, "one/b.jpg"), image(13, "two/b.jpg"), image(14, "two/a.jpg")]
    found = CocoInstances(write(instances(images=images, annotations=[thing(1, 11, COMPRESSED)])))
    counts = {
        name: found.read(name) for name in ("a.jpg", "one/b.jpg", "b.jpg", "x/b.jpg", "x/a.jpg", "d.jpg")
    }
    assert {name: None if each is None else len(each) for name, each in counts.items()} == {
        "a.jpg": 1, "one/b.jpg": 0, "b.jpg": None, "x/b.jpg": None, "x/a.jpg": None, "d.jpg": None,
    }  # fmt: skip
    single = CocoInstances(write(instances()))
    for name in ("val2017/a.jpg", "set.tar/val/a.jpg"):
        read = single.read(name)
        assert read is not None
        assert len(read) == 2


def test_one_broken_annotation_fails_its_own_image_alone(write: Callable[[Any], Path]) -> None:
    content = instances()
    content["annotations"][1]["bbox"] = [0, 0, 1e9, 1]
    found = CocoInstances(write(content))
    with pytest.raises(
        AnnotationError, match=r"^deep/b.jpg: its annotations in instances.json: annotation 0: bbox"
    ):
        found.read("deep/b.jpg")
    assert len(found.read("a.jpg") or ()) == 2
    with pytest.raises(AnnotationError, match=r"^a.jpg: .* for an image of 32 x 24, this one is 24 x 32"):
        found.read("a.jpg", size=(WIDTH, HEIGHT))


def test_an_image_listed_twice_is_an_error_when_it_is_read(write: Callable[[Any], Path]) -> None:
    found = CocoInstances(
        write(instances(images=[image(11, "a.jpg"), image(12, "a.jpg"), image(13, "c.jpg")]))
    )
    with pytest.raises(AnnotationError, match=r"^a.jpg: instances.json lists it 2 times$"):
        found.read("a.jpg")
    assert found.read("c.jpg") is not None


BROKEN: dict[str, tuple[Any, str]] = {
    "not JSON": (b"[", "not JSON"),
    "a list": ([], "it has no images or no annotations"),
    "SA-1B's": ({"image": {}, "annotations": []}, "it has no images or no annotations"),
    "an image without a name": (instances(images=[{"id": 1}]), "image 0 has no file_name"),
    "an image without an id": (instances(images=[{"file_name": "a"}]), "image 0 has no id"),
    "an id that is a list": (instances(images=[image([1], "a")]), "image 0 has no id"),
    "two images of one id": (instances(images=[image(1, "a"), image(1, "b")]), "two images have the same id"),
    "an annotation of no image": (instances(annotations=[{}]), "annotation 0 has no image_id"),
    "an annotation of text": (instances(annotations=["x"]), "annotation 0 has no image_id"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_of_another_layout_is_refused_by_name(name: str, write: Callable[[Any], Path]) -> None:
    content, message = BROKEN[name]
    with pytest.raises(AnnotationError, match=rf"instances.json is not a COCO instances file: {message}"):
        CocoInstances(write(content))


def test_a_missing_or_huge_file_is_refused(
    write: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AnnotationError, match=r"gone.json can't be read: No such file or directory$"):
        CocoInstances(tmp_path / "gone.json")
    monkeypatch.setattr(annotations, "MAX_COCO", 10)
    with pytest.raises(AnnotationError, match=r"it has [\d,]+ bytes, at most 10 are read$"):
        CocoInstances(write(instances()))


def test_a_base_name_that_several_images_have_belongs_to_none_of_them(write: Callable[[Any], Path]) -> None:
    found = CocoInstances(write(instances()))
    found.expect_names(["train/a.jpg", "val/a.jpg", "val/c.jpg"])
    with pytest.raises(
        AnnotationError, match=r"^train/a.jpg: .* lists one a.jpg, and 2 images here have that name"
    ):
        found.read("train/a.jpg")
    assert found.read("a.jpg") is not None
    assert found.read("val/c.jpg") is not None
