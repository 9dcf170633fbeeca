from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from mobilesam.sam import AnnotationError, AnnotationFiles, Annotations, list_images
from mobilesam.sam.labels import annotations

HEIGHT, WIDTH = 30, 40


def mask_of(index: int) -> np.ndarray:
    mask_HW = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask_HW[index : index + 5, 3 : 20 + index] = True
    mask_HW[index + 2, 6] = False
    return mask_HW


def one(index: int) -> dict[str, Any]:
    """An annotation with all that SA-1B's have."""
    runs = coco.encode(np.asfortranarray(mask_of(index), dtype=np.uint8))
    return {
        "id": 1000 + index,
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": runs["counts"].decode()},
        "bbox": [3.0, float(index), 16.0 + index, 4.0],
        "area": int(mask_of(index).sum()),
        "predicted_iou": 0.9,
        "stability_score": 0.95,
        "crop_box": [0.0, 0.0, 40.0, 30.0],
        "point_coords": [[7.5, index + 2.5]],
    }


def sa1b(count: int = 3, **changes: Any) -> dict[str, Any]:
    image = {"image_id": 7, "width": WIDTH, "height": HEIGHT, "file_name": "sa_7.jpg"}
    return {"image": image, "annotations": [one(index) for index in range(count)], **changes}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], AnnotationFiles]:
    """Writes content (JSON values or bytes) as the annotations of sa_7.jpg."""

    def write_content(content: Any) -> AnnotationFiles:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / "sa_7.jpg").touch()
        (tmp_path / "sa_7.json").write_bytes(data)
        return AnnotationFiles(tmp_path)

    return write_content


def make_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def assert_whole(found: Annotations | None, count: int = 3) -> None:
    assert found is not None
    assert len(found) == count
    assert found.size == (HEIGHT, WIDTH)
    for index in range(count):
        mask_HW = found.mask(index)
        assert mask_HW.dtype == bool
        assert np.array_equal(mask_HW, mask_of(index))
        assert found.boxes_P4[index].tolist() == [3, index, 19 + index, index + 4]
        assert found.areas_P[index] == mask_of(index).sum()
        assert np.array_equal(coco.decode(found.rle(index)), mask_of(index))


def test_masks_boxes_and_areas_are_those_in_the_file_beside_the_image(
    write: Callable[[Any], AnnotationFiles],
) -> None:
    files = write(sa1b())
    assert_whole(files.read("sa_7.jpg"))
    assert_whole(files.read("sa_7.jpg", size=(HEIGHT, WIDTH)))


def test_an_image_without_a_file_has_no_annotations(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", {"x.jpg": b""})
    files = AnnotationFiles(tmp_path)
    assert files.read("sa_7.jpg") is None
    assert files.read("gone/sa_7.jpg") is None
    assert files.read("a.tar/x.jpg") is None


def test_every_key_of_a_listing_finds_its_own_file(tmp_path: Path) -> None:
    """Folders, folders in tars, tars in folders, a stem with a dot in it."""
    content = {name: json.dumps(sa1b(count)).encode() for count, name in enumerate(("a.b", "c", "d", "e"), 1)}
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "a.b.jpg").write_bytes(b"-")
    (tmp_path / "deep" / "a.b.json").write_bytes(content["a.b"])
    make_tar(tmp_path / "deep" / "er" / "one.tar", {"./c.jpg": b"-", "./c.json": content["c"]})
    make_tar(
        tmp_path / "two.tar",
        {"in/d.png": b"-", "in/d.json": content["d"], "e.JPG": b"-", "e.json": content["e"], "f.jpg": b"-"},
    )
    files = AnnotationFiles(tmp_path)
    keys = [file.key for file in list_images([tmp_path]).files]
    found = {key: files.read(key) for key in keys}
    counts = {key: None if each is None else len(each) for key, each in found.items()}
    assert {key: files.has_labels(key) for key in keys} == {
        key: count is not None for key, count in counts.items()
    }
    assert counts == {
        "deep/a.b.jpg": 1,
        "deep/er/one.tar/c.jpg": 2,
        "two.tar/in/d.png": 3,
        "two.tar/e.JPG": 4,
        "two.tar/f.jpg": None,
    }


def test_threads_share_one_reading_of_a_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {
        f"{i}.{kind}": json.dumps(sa1b(1 + i % 3)).encode() for i in range(20) for kind in ("jpg", "json")
    }
    make_tar(tmp_path / "t.tar", members)
    scans = []
    scan = annotations.scan_tar
    monkeypatch.setattr(annotations, "scan_tar", lambda path: scans.append(path) or scan(path))
    files = AnnotationFiles(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(files.read, [f"t.tar/{i}.jpg" for i in range(20)]))
    assert [len(each) for each in found if each is not None] == [1 + i % 3 for i in range(20)]
    assert len(scans) == 1


def test_files_and_annotations_survive_pickling(write: Callable[[Any], AnnotationFiles]) -> None:
    files = pickle.loads(pickle.dumps(write(sa1b())))
    assert_whole(pickle.loads(pickle.dumps(files.read("sa_7.jpg"))))


def test_annotations_load_neither_torch_nor_pycocotools_before_a_mask_is_wanted(
    write: Callable[[Any], AnnotationFiles], tmp_path: Path
) -> None:
    write(sa1b())
    code = (
        "import sys; from mobilesam.sam import AnnotationFiles\n"
        f"found = AnnotationFiles({str(tmp_path)!r}).read('sa_7.jpg')\n"
        "print(len(found), sorted({'torch', 'pycocotools'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "3 []\n"


def test_lists_of_counts_and_objects_without_a_pixel_are_read_too(
    write: Callable[[Any], AnnotationFiles],
) -> None:
    empty = {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, "bbox": [0, 0, 0, 0]}
    listed: dict[str, Any] = one(0)
    runs = np.flatnonzero(np.diff(mask_of(0).T.ravel(), prepend=False, append=True))
    listed["segmentation"]["counts"] = np.diff(runs, prepend=0).tolist()
    found = write(sa1b(annotations=[empty, listed, empty, one(1), one(2)])).read("sa_7.jpg")
    assert_whole(found)
    assert found is not None
    assert [reason for reason, _ in found.left_out] == ["mask without a pixel"] * 2


def changed(**changes: Any) -> dict[str, Any]:
    return sa1b(annotations=[one(0), {**one(1), **changes}])


def segmented(**changes: Any) -> dict[str, Any]:
    return changed(segmentation={**one(1)["segmentation"], **changes})


def without(key: str) -> dict[str, Any]:
    return sa1b(annotations=[{name: value for name, value in one(0).items() if name != key}])


def imaged(**changes: Any) -> dict[str, Any]:
    return sa1b(image={**sa1b()["image"], **changes})


BROKEN: dict[str, tuple[Any, str]] = {
    "no bytes": (b"", "not JSON"),
    "not JSON": (b"{", "not JSON"),
    "not text": (b"\xff\xfe\x00", "not JSON"),
    "an image": (b"\xff\xd8\xff", "not JSON"),
    "nested too deep": (b"[" * 200_000, "not JSON"),
    "a number without end": (b'{"image": ' + b"9" * 5000 + b"}", "not JSON"),
    "a list": ([], "not a JSON object"),
    "no image": ({"annotations": []}, "has no image and annotations"),
    "no annotations": ({"image": {}}, "has no image and annotations"),
    "no size": ({"image": {}, "annotations": []}, "no height and width"),
    "a size of nothing": (imaged(height=0), "no height and width"),
    "a size of words": (imaged(width="forty"), "no height and width"),
    "half a pixel": (imaged(width=39.5), "no height and width"),
    "a huge size": (imaged(width=10**9), "the limit is 200,000,000 pixels"),
    "a size beyond all bounds": (imaged(width=10**4000), "the limit is 200,000,000 pixels"),
    "another size": (imaged(width=41), "for an image of 41 x 30, this one is 40 x 30"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_an_error_that_names_the_image_and_the_fact(
    name: str, write: Callable[[Any], AnnotationFiles]
) -> None:
    content, message = BROKEN[name]
    with pytest.raises(AnnotationError, match=message) as caught:
        write(content).read("sa_7.jpg", size=(HEIGHT, WIDTH))
    assert str(caught.value).startswith("sa_7.jpg: its annotations can't be used: ")
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


# The mask of annotation 1 lies in x 3 to 21, y 1 to 6.
LEFT_OUT: dict[str, tuple[dict[str, Any], str, str]] = {
    "an annotation of text": (sa1b(annotations=[one(0), "x"]), "no JSON object", "annotation 1: it is no JSON"),
    "a mask of another size": (segmented(size=[4, 3]), "RLE that doesn't decode to the image's size", "RLE of size"),
    "a mask too short": (segmented(counts="1"), "RLE that doesn't decode to the image's size", "add up to 1 pixels"),
    "a mask cut short": (segmented(counts="o"), "RLE that doesn't decode to the image's size", "end within a run"),
    "no outline": (changed(segmentation=[]), "no outline", "a segmentation has no polygon"),
    "null for an outline": (changed(segmentation=None), "no outline", "neither RLE with size and counts"),
    "an outline of text": (changed(segmentation="1 2 3"), "outline that can't be drawn", "neither RLE"),
    "two corners": (changed(segmentation=[[3, 1, 9, 5]]), "outline of fewer than three corners", "three or more"),
    "half a corner": (changed(segmentation=[[3, 1, 9, 5, 3, 5, 2]]), "outline that can't be drawn", "x and y of"),
    "an outline outside": (changed(segmentation=[[-9, -9, -5, -9, -5, -5]]), "mask without a pixel", "pixel"),
    "a box of NaN": (changed(bbox=[0, 0, float("nan"), 1]), "bbox not in the image", "is not in the image"),
    "an infinite box": (changed(bbox=[0, 0, float("inf"), 1]), "bbox not in the image", "is not in the image"),
    "a huge box": (changed(bbox=[0, 0, 10**300, 1]), "bbox not in the image", "is not in the image"),
    "a box outside": (changed(bbox=[30, 0, 20, 1]), "bbox not in the image", "[30, 0, 20, 1] is not in the image"),
    "a box turned inside out": (changed(bbox=[3, 3, -1, 1]), "bbox not in the image", "is not in the image"),
    "two corners in place of a box": (changed(bbox=[3, 1, 21, 6]), "bbox holds two corners", "two corners (x0, y0"),
    "a box of three": (changed(bbox=[0, 0, 1]), "bbox is not four numbers", "a bbox is not four numbers"),
    "a box of text": (changed(bbox="0 0 1 1"), "bbox is not four numbers", "a bbox is not four numbers"),
    "a box of words": (changed(bbox=["a", "b", "c", "d"]), "bbox is not four numbers", "not four numbers"),
    "a crowd": (changed(iscrowd=1), "crowd", "a region of many objects"),
    "a crowd as text": (changed(iscrowd="1"), "crowd", "a region of many objects"),
    "a crowd in a word": (changed(iscrowd="True"), "crowd", "a region of many objects"),
    "a crowd or not": (changed(iscrowd=7), "iscrowd is neither 0 nor 1", "its iscrowd is '7'"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_an_object_that_cannot_be_used_costs_itself_and_says_why(
    name: str, write: Callable[[Any], AnnotationFiles]
) -> None:
    content, reason, fact = LEFT_OUT[name]
    found = write(content).read("sa_7.jpg", size=(HEIGHT, WIDTH))
    assert found is not None
    assert len(found) == 1
    assert np.array_equal(found.mask(0), mask_of(0))
    ((told, text),) = found.left_out
    assert told == reason
    assert fact in text
    assert text.startswith(("annotation 1: ", "annotation with id 1001: "))
    assert len(text) < 300


UNDERSTOOD: dict[str, tuple[dict[str, Any], list[float]]] = {
    "no box": (changed(bbox=[]), [3, 1, 21, 6]),
    "null for a box": (changed(bbox=None), [3, 1, 21, 6]),
    "a box elsewhere": (changed(bbox=[25, 20, 5, 5]), [3, 1, 21, 6]),
    "a box in parts of the image": (changed(bbox=[0.1, 0.1, 0.4, 0.2]), [3, 1, 21, 6]),
    "a box without an area": (changed(bbox=[0, 0, 0, 0]), [3, 1, 21, 6]),
    "a box of numbers as text": (changed(bbox=["3", "1.0", "17", " 4 "]), [3, 1, 20, 5]),
    "a box one pixel over the edge": (changed(bbox=[-1, 0, 25, 7]), [0, 0, 24, 7]),
    "a box far over the edge where its mask ends there": (
        changed(bbox=[-9, 1, 29, 5], segmentation=[[-9, 1, 20, 1, 20, 6, -9, 6]]), [0, 1, 20, 6],
    ),
    "an object that is no crowd, in a word": (changed(iscrowd="false"), [3, 1, 20, 5]),
    "a size of numbers as text": (changed(iscrowd=False) | {"image": {"width": "40", "height": 30.0}}, [3, 1, 20, 5]),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_what_is_unambiguous_is_understood_and_boxes_stay_in_the_image(
    name: str, write: Callable[[Any], AnnotationFiles]
) -> None:
    content, box = UNDERSTOOD[name]
    found = write(content).read("sa_7.jpg", size=(HEIGHT, WIDTH))
    assert found is not None
    assert len(found) == 2
    assert not found.left_out
    assert found.boxes_P4[1].tolist() == box


def test_objects_without_a_box_have_that_of_their_mask(write: Callable[[Any], AnnotationFiles]) -> None:
    bare = [{"segmentation": one(index)["segmentation"]} for index in range(3)]
    found = write(sa1b(annotations=bare)).read("sa_7.jpg")
    assert found is not None
    for index in range(3):
        x, y, width, height = coco.toBbox(found.rle(index)).tolist()
        assert found.boxes_P4[index].tolist() == [x, y, x + width, y + height]


def test_cocos_layout_beside_an_image_is_read_too(write: Callable[[Any], AnnotationFiles]) -> None:
    content = {"images": [sa1b()["image"]], "annotations": sa1b()["annotations"]}
    assert_whole(write(content).read("sa_7.jpg", size=(HEIGHT, WIDTH)))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_understood(encoding: str, write: Callable[[Any], AnnotationFiles]) -> None:
    assert_whole(write(json.dumps(sa1b()).encode(encoding)).read("sa_7.jpg"))


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        (lambda: 6, r"its EXIF orientation \(6\) turns it and the labels are of the unturned photo"),
        (lambda: 1, r"this one is 30 x 40: width and height are exchanged$"),
        (None, r"width and height are exchanged, as for a photo that EXIF turns"),
    ],
)
def test_labels_of_a_photo_that_exif_turns_say_so(
    turn: Callable[[], int] | None, told: str, write: Callable[[Any], AnnotationFiles]
) -> None:
    with pytest.raises(AnnotationError, match=told):
        write(sa1b()).read("sa_7.jpg", size=(WIDTH, HEIGHT), turn=turn)


def test_a_huge_file_and_too_many_objects_are_not_read(
    write: Callable[[Any], AnnotationFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write(sa1b())
    monkeypatch.setattr(annotations, "MOST_OBJECTS", 2)
    with pytest.raises(AnnotationError, match="3 objects, at most 2 are read"):
        files.read("sa_7.jpg")
    with (tmp_path / "sa_7.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(
        AnnotationError, match=r"they have 1,099,511,627,776 bytes, at most 16,777,216 are read"
    ):
        files.read("sa_7.jpg")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "sa_7.json").mkdir()
    with pytest.raises(AnnotationError, match=r"^sa_7.jpg: .*can't be read: Is a directory$"):
        AnnotationFiles(tmp_path).read("sa_7.jpg")


def test_a_damaged_tar_does_not_pass_for_one_without_annotations(tmp_path: Path) -> None:
    content = json.dumps(sa1b()).encode()
    make_tar(tmp_path / "t.tar", {"1.jpg": b"-", "1.json": content, "2.jpg": b"-", "2.json": content})
    whole = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(whole[: whole.rindex(content) + 10])
    files = AnnotationFiles(tmp_path)
    assert_whole(files.read("t.tar/1.jpg"))
    with pytest.raises(AnnotationError, match=r"t.tar/2.jpg: .*its tar is truncated"):
        files.read("t.tar/2.jpg")
    (tmp_path / "t.tar").write_bytes(whole[:600])
    with pytest.raises(AnnotationError, match=r"t.tar/1.jpg: .*only 0 of their [\d,]+ bytes could be read"):
        files.read("t.tar/1.jpg")


def test_a_link_in_a_tar_is_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        info = tarfile.TarInfo("1.json")
        info.type, info.linkname = tarfile.SYMTYPE, "0.json"
        tar.addfile(info)
    with pytest.raises(AnnotationError, match="a link or sparse file"):
        AnnotationFiles(tmp_path).read("t.tar/1.jpg")


@pytest.mark.parametrize(
    "content", [{"imagePath": "sa_7.jpg", "shapes": []}, {"caption": "a cup", "width": 3}, {}]
)
def test_json_of_another_program_beside_an_image_is_not_taken_for_annotations(
    content: dict[str, Any], write: Callable[[Any], AnnotationFiles]
) -> None:
    assert write(content).read("sa_7.jpg", size=(HEIGHT, WIDTH)) is None


def test_an_annotation_file_is_found_without_being_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"{")
    make_tar(tmp_path / "b.tar", {"c.jpg": b"-", "c.json": b"{", "e.jpg": b"-"})
    files = AnnotationFiles(tmp_path)
    keys = ("a.jpg", "d.jpg", "b.tar/c.jpg", "b.tar/e.jpg")
    assert [files.has_labels(key) for key in keys] == [True, False, True, False]
