from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco
from pycocotools.coco import COCO

from mobilesam.sam import AnnotationError, CocoInstances
from mobilesam.sam.labels import coco as coco_file
from mobilesam.sam.labels.coco import match_names

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


def test_one_broken_annotation_costs_itself_alone(write: Callable[[Any], Path]) -> None:
    content = instances()
    content["annotations"][0]["bbox"] = [0, 0, 1e9, 1]
    found = CocoInstances(write(content)).read("a.jpg")
    assert found is not None
    assert len(found) == 1
    assert [reason for reason, _ in found.left_out] == ["bbox not in the image", "crowd"]
    assert found.left_out[0][1] == "annotation with id 1: bbox [0, 0, 1000000000.0, 1] is not in the image"
    with pytest.raises(AnnotationError, match=r"^a.jpg: .* for an image of 32 x 24, this one is 24 x 32"):
        CocoInstances(write(content)).read("a.jpg", size=(WIDTH, HEIGHT))


def test_an_image_listed_twice_has_the_objects_of_both_each_once(write: Callable[[Any], Path]) -> None:
    images = [image(11, "a.jpg"), image(12, "a.jpg"), image(13, "c.jpg")]
    objects = [
        thing(1, 11, COMPRESSED),
        thing(2, 12, COMPRESSED),
        thing(3, 12, [[9, 9, 30, 9, 30, 20]], bbox=[]),
    ]
    found = CocoInstances(write(instances(images=images, annotations=objects)))
    assert len(found) == 2
    both = found.read("a.jpg")
    assert both is not None
    assert len(both) == 2
    other = CocoInstances(write(instances(images=[image(11, "a.jpg"), image(12, "a.jpg", width=9)])))
    with pytest.raises(AnnotationError, match=r"^a.jpg: .* it is listed twice with different sizes$"):
        other.read("a.jpg")


def test_images_of_one_id_fail_alone_and_name_each_other(write: Callable[[Any], Path]) -> None:
    images = [image(11, "a.jpg"), image("11", "b.jpg"), image(13, "c.jpg")]
    found = CocoInstances(write(instances(images=images, annotations=[thing(1, 13, COMPRESSED)])))
    with pytest.raises(AnnotationError, match=r"^a.jpg: .* b.jpg is listed with the same id, 11$"):
        found.read("a.jpg")
    assert len(found.read("c.jpg") or ()) == 1


def test_objects_of_no_listed_image_and_images_without_a_name_are_counted(
    write: Callable[[Any], Path],
) -> None:
    objects = [{}, "x", thing(1, 99, COMPRESSED), thing(2, "11", COMPRESSED), thing(3, 11.0, COMPRESSED)]
    images = [image(11, "a.jpg"), {"id": 5}, {"file_name": "b.jpg"}, "x"]
    found = CocoInstances(write(instances(images=images, annotations=objects)))
    assert len(found.read("a.jpg") or ()) == 2
    assert dict(found.unusable) == {
        "image with no file_name": 2, "image with no id": 1, "no image_id": 2, "of no listed image": 1,
    }  # fmt: skip


NFC, NFD = "M\u00fcller.jpg", "Mu\u0308ller.jpg"
NAMES: dict[str, tuple[list[str], list[str], dict[str, int]]] = {
    "backslashes": (["images\\p1.jpg"], ["p1.jpg"], {"p1.jpg": 0}),
    "a Windows path": (["C:\\data\\day\\p1.jpg"], ["day/p1.jpg", "night/p1.jpg"], {"day/p1.jpg": 0}),
    "an absolute path": (["/home/me/day/p1.jpg"], ["day/p1.jpg", "p2.jpg"], {"day/p1.jpg": 0}),
    "a URL": (["https://host/a%20b/p%201.jpg?sig=x%2F"], ["p 1.jpg"], {"p 1.jpg": 0}),
    "Label Studio's local files": (["/data/local-files/?d=a/p1.jpg"], ["a/p1.jpg"], {"a/p1.jpg": 0}),
    "percent-encoding": (["p%201.jpg"], ["p 1.jpg"], {"p 1.jpg": 0}),
    "a name with a percent sign": (["50%25.jpg"], ["50%25.jpg", "50%.jpg"], {"50%25.jpg": 0}),
    "composed for decomposed": ([NFC], [NFD], {NFD: 0}),
    "decomposed for composed": ([NFD], [NFC], {NFC: 0}),
    "the suffix in capitals": (["p1.jpg"], ["p1.JPG"], {"p1.JPG": 0}),
    "the name in capitals": (["IMG_1.JPG"], ["img_1.jpg"], {"img_1.jpg": 0}),
    "equal names before others": (["p1.jpg", "P1.jpg"], ["P1.jpg", "p1.jpg"], {"p1.jpg": 0, "P1.jpg": 1}),
    "two images that differ in case": (["P1.JPG"], ["p1.jpg", "p1.JPG"], {}),
    "the suffix's case before the name's": (["P1.JPG"], ["p1.jpg", "P1.Jpg"], {"P1.Jpg": 0}),
    "a base name in two folders": (["a.jpg"], ["x/a.jpg", "y/a.jpg"], {}),
    "two names for one image": (["x/a.jpg", "y/a.jpg"], ["a.jpg"], {}),
    "the nearest folder": (["2/d/a.jpg", "2/n/a.jpg"], ["d/a.jpg", "n/a.jpg"], {"d/a.jpg": 0, "n/a.jpg": 1}),
    "another image": (["a.jpg"], ["b.jpg"], {}),
    "another suffix": (["a.png"], ["a.jpg"], {}),
    "no suffix": (["x/a", "b.v2"], ["a.JPG", "b.v2.jpg"], {"a.JPG": 0, "b.v2.jpg": 1}),
    "no suffix and two images": (["a"], ["a.jpg", "a.png"], {}),
    "Roboflow's copy": ([f"a_JPG.rf.{'0f' * 16}.jpg"], ["x/a.JPG", "b.jpg"], {"x/a.JPG": 0}),
    "Roboflow's two copies of one": ([f"a_jpg.rf.{c * 32}.jpg" for c in "0f"], ["a.jpg"], {}),
    "Label Studio's copy": (["/data/upload/1/ab12cd34-a-b.png"], ["a-b.png", "b.png"], {"a-b.png": 0}),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_as_exporters_write_them_find_their_image_where_one_fits(name: str) -> None:
    names, keys, wanted = NAMES[name]
    assert match_names(names, keys).found == wanted


ROOTED: dict[str, tuple[list[str], list[str], dict[str, int]]] = {
    "the first root and a sibling": (
        ["day1/a.jpg", "day2/a.jpg"], ["a.jpg", "../day2/a.jpg"], {"a.jpg": 0, "../day2/a.jpg": 1},
    ),
    "the first root alone": (["day1/a.jpg"], ["a.jpg", "../day2/a.jpg"], {"a.jpg": 0}),
    "a sibling alone": (["x/day2/a.jpg"], ["a.jpg", "../day2/a.jpg", "../day3/a.jpg"], {"../day2/a.jpg": 0}),
    "an absolute path of one of several": (["/photos/day1/a.jpg"], ["a.jpg", "sub/a.jpg"], {"a.jpg": 0}),
    "a folder named like the root": (["day1/a.jpg"], ["a.jpg", "day1/a.jpg"], {"day1/a.jpg": 0}),
    "a base name of both": (["x/a.jpg"], ["a.jpg", "../day2/a.jpg"], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROOTED)
def test_the_folders_of_the_root_are_part_of_a_photos_path(name: str) -> None:
    names, keys, wanted = ROOTED[name]
    assert match_names(names, keys, root=Path("/photos/day1")).found == wanted


def test_what_matches_nothing_or_more_than_one_is_told_in_numbers() -> None:
    names = ["p1.jpg", *(f"gone{i}.jpg" for i in range(5)), "twin.jpg"]
    match = match_names(names, ["p1.jpg", "x/twin.jpg", "y/twin.jpg"])
    assert match.to_json() == {
        "listed": 7, "matched": 1, "missing": 5, "ambiguous": 1,
        "first_missing": ["gone0.jpg", "gone1.jpg", "gone2.jpg"], "first_ambiguous": ["twin.jpg"],
    }  # fmt: skip
    missing, ambiguous = match.lines("a.json")
    assert missing == (
        "a.json: 1 of 7 listed images are among yours; not among them: gone0.jpg, gone1.jpg, gone2.jpg and 2 more"
    )
    assert ambiguous.startswith("a.json: 1 listed names are left out, as each fits several images")
    assert match_names(["p1.jpg"], ["p1.jpg"]).lines("a.json") == []
    assert match_names(["p1.png", "p2.png"], ["p1.jpg"], stems=True).lines("masks") == [
        "masks: 1 of 2 masks are named like one of your images; not among them: p2.png"
    ]


def test_matching_many_names_takes_seconds_not_minutes() -> None:
    names = [f"/data/set/{i % 100}/{i}/image.JPG" for i in range(10_000)]
    keys = [f"{i % 100}/{i}/image.jpg" for i in range(10_000)]
    start = time.perf_counter()
    match = match_names(names, keys)
    assert match.found == {key: i for i, key in enumerate(keys)}
    assert time.perf_counter() - start < 10


BROKEN: dict[str, tuple[Any, str]] = {
    "not JSON": (b"[", "not JSON"),
    "a list": ([], "it has no images or no annotations"),
    "SA-1B's": ({"image": {}, "annotations": []}, "it has no images or no annotations"),
    "a list of detections": ([{"image_id": 1}], "it has no images or no annotations, but is a list"),
    "VIA's": (
        {"_via_settings": {}, "x": 1},
        "it has no images or no annotations, but the keys _via_settings, x",
    ),
    "gzip": (b"\x1f\x8b\x08\0", "it is a file of kind gzip, not JSON"),
    "empty": (b" \n", "it is empty"),
    "JSON Lines": (b"{}\n{}", "not JSON .*: several values, as in JSON Lines; write one"),
    "an image without a name": (instances(images=[{"id": 1}]), "image 0 has no file_name"),
    "an image without an id": (instances(images=[{"file_name": "a"}]), "image 0 has no id"),
    "an id that is a list": (instances(images=[image([1], "a")]), "image 0 has no id"),
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
    monkeypatch.setattr(coco_file, "MAX_BYTES", 10)
    with pytest.raises(AnnotationError, match=r"it has [\d,]+ bytes, at most 10 are read$"):
        CocoInstances(write(instances()))


def test_a_base_name_that_several_images_have_belongs_to_none_of_them(write: Callable[[Any], Path]) -> None:
    found = CocoInstances(write(instances()))
    match = found.match(["train/a.jpg", "val/a.jpg", "val/c.jpg"])
    assert match.ambiguous == ("a.jpg",)
    assert found.read("train/a.jpg") is None
    assert found.read("val/c.jpg") is not None
    assert (found.object_count("val/c.jpg"), found.has_labels("val/c.jpg")) == (0, True)


def test_objects_of_a_panoptic_file_are_left_out_for_want_of_an_outline(write: Callable[[Any], Path]) -> None:
    objects = [{"image_id": 11, "file_name": "a.png", "segments_info": [{"id": 3, "bbox": [0, 0, 4, 4]}]}]
    images = [{"image_id": 11, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}]
    found = CocoInstances(write(instances(images=images, annotations=objects))).read("a.jpg")
    assert found is not None
    assert [reason for reason, _ in found.left_out] == ["no outline"]


def test_lvis_images_are_named_by_their_url(write: Callable[[Any], Path]) -> None:
    listed = {
        "id": 11,
        "coco_url": "http://images.cocodataset.org/train2017/a.jpg",
        "height": HEIGHT,
        "width": WIDTH,
    }
    content = instances(images=[listed], annotations=[{"image_id": 11, "segmentation": COMPRESSED}])
    assert len(CocoInstances(write(content)).read("a.jpg") or ()) == 1
