"""Folders beside the first one, moved folders and labels of both, through the commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from one_process import one_process_cluster
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from small_student import registered_small_student

from mobilesam.cli import main
from mobilesam.distill.students import cost

SQUARE = {"iscrowd": 0, "bbox": [4, 4, 20, 20], "segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]]}


def mobilesam(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def photos(folder: Path, hue: int, count: int = 3) -> Path:
    folder.mkdir(parents=True)
    y, x = np.mgrid[:48, :64]
    for number in range(count):
        pixels = np.stack([(2 * x + 20 * number) % 256, 2 * y % 256, (x + y + hue) % 256], -1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"p{number}.jpg")
    return folder


def coco_file(path: Path, names: list[str], **size: int | None) -> Path:
    images = [{"id": i, "file_name": name, "height": 48, "width": 64, **size} for i, name in enumerate(names)]
    objects = [{**SQUARE, "id": image["id"], "image_id": image["id"]} for image in images]
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": []}))
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "FORWARDS", 1)
    torch.set_num_threads(1)
    return tmp_path


@pytest.fixture
def siblings(place: Path) -> Path:
    """s.zarr of day1 and, extended by, day2, whose photos have the names of day1's."""
    with one_process_cluster() as cluster:
        for folder, hue in (("day1", 0), ("day2", 90)):
            photos(place / folder, hue)
            made = mobilesam(
                "precompute", "--images", folder, "--out", "s.zarr", "--extend", "--teacher", "vit_nano",
                "--image-size", 64, "--audit", 0, "--shard-size", 2, "--scheduler", cluster.scheduler_address,
            )  # fmt: skip
            assert made.exit_code == 0, made.output
    return place


@pytest.fixture
def evaluate(place: Path) -> Callable[..., dict]:
    """evaluate(*options) -> the number of objects that vit_nano was judged by in each labelled image, and all."""

    def run(*options: object) -> dict:
        done = mobilesam(
            "evaluate", "--points", 0, "--distances", "none", "--model", "a=vit_nano", "--json", *options
        )
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return run


def test_labels_of_sibling_folders_find_their_photos(siblings: Path, evaluate: Callable[..., dict]) -> None:
    """T5: names of the first folder are told from those of a folder that the store was extended by."""
    for names in (["day1/p0.jpg", "day2/p0.jpg"], ["day1/p0.jpg", "day1/p1.jpg"], ["day2/p2.jpg"]):
        coco_file(siblings / "labels.json", names)
        result = evaluate("--store", "s.zarr", "--split", "all", "--coco", "labels.json")
        assert result["labels"]["names"]["matched"] == result["labelled"] == len(names)
    coco_file(siblings / "labels.json", [str(siblings / f"day1/p{number}.jpg") for number in range(3)])
    with registered_small_student() as student:
        trained = mobilesam(
            "distill", "--store", "s.zarr", "--student", student, "--objective", "coupled", "--coco", "labels.json",
            "--epochs", 1, "--batch-size", 2, "--objects", 1, "--rounds", 1, "--device", "cpu", "--json",
        )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert json.loads(trained.stdout)["labels"]["annotated"] == 3


def test_a_moved_first_folder_without_its_sibling_is_told_before_training(siblings: Path) -> None:
    """T5: photos of the other folder are looked for beside the moved one; the message says where, and the mend."""
    (siblings / "archive").mkdir()
    shutil.move("day1", "archive/day1")
    with registered_small_student() as student:
        arguments = ("distill", "--store", "s.zarr", "--student", student, "--epochs", 1, "--batch-size", 2)
        arguments += ("--device", "cpu", "--images", "archive/day1")
        refused = mobilesam(*arguments)
        assert refused.exit_code == 3
        assert f"{siblings}/day2/p0.jpg is looked for at {siblings}/archive/day2/p0.jpg" in refused.stderr
        assert "move this one too, or link it there" in refused.stderr
        assert not (siblings / "runs").exists()
        (siblings / "archive/day2").symlink_to(siblings / "day2")
        assert mobilesam(*arguments).exit_code == 0


def test_photos_that_moved_into_a_subfolder_are_found_there(siblings: Path) -> None:
    """T5: a root whose photos went down a folder, is the new root; a copy beside them is new photos."""
    with one_process_cluster() as cluster:
        options = ("--teacher", "vit_nano", "--image-size", 64, "--audit", 0, "--json")
        options += ("--scheduler", cluster.scheduler_address, "--out", "both.zarr")
        assert mobilesam("precompute", "--images", "day1", "day2", *options).exit_code == 0
        shutil.copytree("day1", "copy/day1")
        copied = mobilesam("precompute", "--images", "copy", *options)
        assert copied.exit_code == 3
        assert "lie outside what --images names" in copied.stderr
        (siblings / "archive").mkdir()
        for folder in ("day1", "day2"):
            shutil.move(folder, f"archive/{folder}")
        again = mobilesam("precompute", "--images", "archive/day1", "archive/day2", *options)
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["done_before"] == 6
    assert f"the store's photos, once in {siblings}, are read from {siblings}/archive" in again.stderr


def test_an_image_without_a_stated_size_has_that_of_its_photo(
    place: Path, evaluate: Callable[..., dict]
) -> None:
    """L3: a COCO file may state no width and height; a photo that EXIF turns may be labelled either way."""
    photos(place / "photos", 0, count=1)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open("photos/p0.jpg").save("photos/p1.jpg", exif=turned)
    coco_file(place / "labels.json", ["p0", "p1.jpg"], height=None, width=None)
    result = evaluate("--images", "photos", "--coco", "labels.json", "--image-size", 64)
    assert result["labelled"] == 1
    assert "no height and width" in json.dumps(result)


def test_what_servers_put_beside_photos_is_no_photo_and_damaged_metadata_costs_none(place: Path) -> None:
    """I3: thumbnails of a NAS aren't embedded, other formats are counted by name, a text's checksum is no pixel's."""
    photos(place / "photos", 0, count=2)
    photos(place / "photos/@eaDir/p0.jpg", 0, count=1)
    text = PngInfo()
    text.add_text("Comment", "hello")
    Image.open("photos/p0.jpg").save("photos/damaged.png", pnginfo=text)
    data = bytearray((place / "photos/damaged.png").read_bytes())
    data[data.index(b"hello")] ^= 1
    (place / "photos/damaged.png").write_bytes(data)
    Image.open("photos/p0.jpg").save("photos/scan.ppm")
    with one_process_cluster() as cluster:
        arguments = ("--teacher", "vit_nano", "--image-size", 64, "--audit", 0, "--json")
        arguments += ("--scheduler", cluster.scheduler_address, "--images", "photos")
        made = mobilesam("precompute", *arguments, "--out", "s.zarr")
        inside = mobilesam("precompute", *arguments, "--out", "s.zarr/two.zarr")
    assert made.exit_code == 0, made.output
    result = json.loads(made.stdout)
    assert (result["done"], result["failed"]) == (3, 0)
    assert result["passed_over"] == {"Netpbm": 1, "system folder": 1}
    assert inside.exit_code == 3
    assert f"--out s.zarr/two.zarr is inside the store {place}/s.zarr: give a path outside" in inside.stderr
