"""Labels as exporters write them, through evaluate and distill."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from gradient_photo import gradient_photo
from labelled_shapes import write_shapes
from one_process import one_process_cluster
from photo_store import make_photo_store
from PIL import Image
from small_student import registered_small_student

from mobilesam.cli import main
from mobilesam.distill import Run, build_student, save_student
from mobilesam.distill.students import cost
from mobilesam.sam.teacher import load_head

GOOD = {
    "id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 1600, "bbox": [20, 20, 40, 40],
    "segmentation": [[20, 20, 60, 20, 60, 60, 20, 60]],
}  # fmt: skip
TWO = {**GOOD, "id": 2}
IMAGE = {"id": 1, "file_name": "p1.jpg", "width": 128, "height": 96}
CROWD = {
    **GOOD,
    "id": 3,
    "iscrowd": 1,
    "segmentation": {"size": [96, 128], "counts": [200, 50, 96 * 128 - 250]},
}

Evaluate = Callable[..., dict[str, Any]]


def mobilesam(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def coco_file(
    path: Path, annotations: list[Any], images: list[Any] | None = None, encoding: str = "utf-8"
) -> Path:
    content = {
        "images": images or [IMAGE],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "x"}],
    }
    path.write_bytes(json.dumps(content).encode(encoding))
    return path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with two photos of the cases, 128 x 96, in photos/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "FORWARDS", 1)
    torch.set_num_threads(1)
    (tmp_path / "photos").mkdir()
    for number in (1, 3):
        gradient_photo(number, (96, 128)).save(tmp_path / "photos" / f"p{number}.jpg", quality=92)
    return tmp_path


@pytest.fixture
def evaluate(place: Path) -> Evaluate:
    """evaluate(annotations, images=None, ...) -> what evaluate --coco prints as JSON."""

    def run(
        annotations: list[Any],
        images: list[Any] | None = None,
        *,
        photos: str = "photos",
        code: int = 0,
        encoding: str = "utf-8",
    ) -> dict[str, Any]:
        path = coco_file(place / "labels.json", annotations, images, encoding)
        result = mobilesam(
            "evaluate", "--images", photos, "--coco", path, "--teacher", "vit_nano", "--image-size", 64,
            "--points", 0, "--distances", "none", "--model", "a=vit_nano", "--json",
        )  # fmt: skip
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)

    return run


def judged(result: dict[str, Any]) -> int:
    """Number of objects that the model was judged by."""
    return result["models"][0]["labels"]["box"]["prompts"] if result["labelled"] else 0


# What a broken object is left out for.
LEFT_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "no outline": ({"segmentation": []}, "no outline"),
    "four numbers": ({"segmentation": [[20, 20, 40, 40]]}, "outline of fewer than three corners"),
    "an outline far away": ({"segmentation": [[9e9, 20, 60, 20, 60, 60]]}, "outline that can't be drawn"),
    "RLE of another size": (
        {"segmentation": {"size": [9, 9], "counts": [81]}}, "RLE that doesn't decode to the image's size",
    ),
    "a box of three numbers": ({"bbox": [20, 20, 40]}, "bbox is not four numbers"),
    "two corners": (
        {"bbox": [80, 60, 120, 90], "segmentation": [[80, 60, 120, 60, 120, 90, 80, 90]]}, "bbox not in the image",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_broken_object_is_left_out_and_counted_and_the_good_one_is_judged(
    name: str, evaluate: Evaluate
) -> None:
    """L1, L2: one broken object costs itself, never its image, and is counted by reason."""
    changes, reason = LEFT_OUT[name]
    result = evaluate([{**GOOD, **changes}, TWO])
    assert (result["labelled"], judged(result), result["failed"]) == (1, 1, [])
    assert result["labels"]["left_out"] == {reason: 1}
    assert result["notes"][0] == f"1 of 2 labelled objects left out ({reason}: 1)"
    assert result["notes"][1].startswith("left out: p1.jpg: annotation with id 1: ")


UNDERSTOOD: dict[str, dict[str, Any]] = {
    "a flat list of numbers": {"segmentation": [20, 20, 60, 20, 60, 60, 20, 60]},
    "a sliver beside the ring": {"segmentation": [[20, 20, 21, 21], *GOOD["segmentation"]]},
    "a box three pixels out": {"bbox": [-3, 20, 63, 40], "segmentation": [[-3, 20, 60, 20, 60, 60, -3, 60]]},
    "an outline over the edge, its box clipped": {
        "bbox": [0, 20, 60, 40], "segmentation": [[-3, 20, 60, 20, 60, 60, -3, 60]],
    },
    "an empty box": {"bbox": []},
    "numbers as text": {"bbox": ["20", "20", "40", "40"]},
    "uncompressed RLE": {**CROWD, "id": 1, "iscrowd": 0},
    "iscrowd as text": {"iscrowd": "0"},
    "iscrowd in a word": {"iscrowd": False},
}  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_odd_objects_that_are_clear_are_judged_without_a_word(name: str, evaluate: Evaluate) -> None:
    """L1, L2, L3: what is clear is understood; a box is clipped to the image, or made from the mask."""
    result = evaluate([{**GOOD, **UNDERSTOOD[name]}, TWO])
    assert (judged(result), result["labels"]["left_out"], result["notes"]) == (2, {}, [])


def test_a_missing_box_is_the_masks_own(evaluate: Evaluate) -> None:
    """L2: the mask is what counts; the same numbers come out as with its box."""
    bare = evaluate([{key: value for key, value in GOOD.items() if key != "bbox"}])
    assert bare["models"][0]["labels"] == evaluate([GOOD])["models"][0]["labels"]


NAMES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "backslashes": ([GOOD], {"file_name": "images\\p1.jpg"}),
    "ids as text": ([{**GOOD, "image_id": "1541715161404"}], {"id": "1541715161404"}),
    "ids of two kinds": ([{**GOOD, "image_id": "1"}], {}),
    "sizes as floats": ([GOOD], {"width": 128.0, "height": 96.0}),
    "a suffix in capitals": ([GOOD], {"file_name": "p1.JPG"}),
    "a URL": ([GOOD], {"file_name": "https://host/upload/p1.jpg?sig=1"}),
    "an absolute path": ([GOOD], {"file_name": "/home/me/photos/p1.jpg"}),
    "percent-encoding": ([GOOD], {"file_name": "%701.jpg"}),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_ids_as_exporters_write_them_are_understood(name: str, evaluate: Evaluate) -> None:
    """L3: backslashes, text ids, float sizes, another case, URLs and paths find their one photo."""
    annotations, image = NAMES[name]
    result = evaluate(annotations, [{**IMAGE, **image}])
    assert (judged(result), result["labels"]["names"]["matched"], result["notes"]) == (1, 1, [])


def test_lvis_needs_neither_file_name_nor_iscrowd(evaluate: Evaluate) -> None:
    """L3: LVIS names its images by coco_url."""
    url = {"id": 1, "coco_url": "http://images.cocodataset.org/train2017/p1.jpg", "width": 128, "height": 96}
    assert judged(evaluate([{key: value for key, value in GOOD.items() if key != "iscrowd"}], [url])) == 1


@pytest.mark.parametrize(("on_disk", "listed"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_composed_and_decomposed_umlauts_are_the_same_name(
    on_disk: Any, listed: Any, place: Path, evaluate: Evaluate
) -> None:
    """L3: a Mac's Müller.jpg is Müller.jpg."""
    (place / "umlauts").mkdir()
    shutil.copy(
        place / "photos" / "p1.jpg", place / "umlauts" / unicodedata.normalize(on_disk, "M\u00fcller.jpg")
    )
    image = {**IMAGE, "file_name": unicodedata.normalize(listed, "M\u00fcller.jpg")}
    assert judged(evaluate([GOOD], [image], photos="umlauts")) == 1


def test_names_that_match_no_photo_are_told_in_numbers(evaluate: Evaluate) -> None:
    """L3: half of the listed images are found, the other half is named."""
    result = evaluate([GOOD], [IMAGE, {**IMAGE, "id": 2, "file_name": "gone.jpg"}])
    assert judged(result) == 1
    assert result["notes"] == ["labels.json: 1 of 2 listed images are among yours; not among them: gone.jpg"]
    assert result["labels"]["names"] == {
        "listed": 2, "matched": 1, "missing": 1, "ambiguous": 0, "first_missing": ["gone.jpg"], "first_ambiguous": [],
    }  # fmt: skip


def test_a_name_that_fits_two_photos_is_left_out_and_said(place: Path, evaluate: Evaluate) -> None:
    """L3: labels of p1.jpg alone belong to neither a/p1.jpg nor b/p1.jpg; p3.jpg's are judged."""
    for folder in ("a", "b"):
        (place / "two" / folder).mkdir(parents=True)
        shutil.copy(place / "photos" / "p1.jpg", place / "two" / folder)
    shutil.copy(place / "photos" / "p3.jpg", place / "two")
    result = evaluate(
        [GOOD, {**TWO, "image_id": 2}], [IMAGE, {**IMAGE, "id": 2, "file_name": "p3.jpg"}], photos="two"
    )
    assert (judged(result), result["labels"]["names"]["ambiguous"]) == (1, 1)
    assert any("1 listed names are left out, as each fits several images" in note for note in result["notes"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_read(encoding: str, evaluate: Evaluate) -> None:
    """L4: a BOM in UTF-8 or UTF-16 is no damage."""
    assert judged(evaluate([GOOD], encoding=encoding)) == 1


@pytest.mark.parametrize("counts", [CROWD["segmentation"]["counts"], [1, 2]])
def test_crowds_are_left_out_whole_or_broken(counts: list[int], evaluate: Evaluate) -> None:
    """L4: the good object beside a crowd is judged, the crowd counted."""
    crowd = {**CROWD, "segmentation": {"size": [96, 128], "counts": counts}}
    result = evaluate([crowd, GOOD])
    assert (judged(result), result["labels"]["left_out"], result["failed"]) == (1, {"crowd": 1}, [])


def test_labels_of_the_unturned_photo_fail_with_exif_named(place: Path, evaluate: Evaluate) -> None:
    """L4: EXIF turns the photo to 96 x 128, the labels are of 128 x 96."""
    exif = Image.Exif()
    exif[0x112] = 6
    (place / "turned").mkdir()
    Image.open(place / "photos" / "p1.jpg").save(place / "turned" / "p1.jpg", exif=exif)
    (failed,) = evaluate([GOOD], photos="turned", code=3)["failed"]
    assert (
        "they are for an image of 128 x 96, this one is 96 x 128, since its EXIF orientation (6)"
        in failed["reason"]
    )
    assert "label the upright photo, or save the photo without the EXIF orientation" in failed["reason"]


def test_cocos_layout_beside_a_photo_is_used_and_labelmes_is_ignored(place: Path) -> None:
    """L4: p1.json in COCO's layout holds p1.jpg's labels; p3.json is another program's."""
    (place / "photos" / "p1.json").write_text(json.dumps({"images": [IMAGE], "annotations": [GOOD]}))
    (place / "photos" / "p3.json").write_text(
        json.dumps({"version": "5", "shapes": [], "imagePath": "p3.jpg"})
    )
    result = mobilesam(
        "evaluate", "--images", "photos", "--image-size", 64, "--points", 0, "--model", "a=vit_nano", "--json"
    )
    assert result.exit_code == 0
    assert judged(json.loads(result.stdout)) == 1
    assert "JSON" not in result.stderr, "labels are not passed over"


@pytest.mark.parametrize(
    ("annotations", "told"),
    [
        ([CROWD], "nothing to judge: 1 labelled object, a crowd"),
        ([CROWD, {**CROWD, "id": 4}], "nothing to judge: 2 labelled objects, all crowds"),
        (
            [CROWD, {**GOOD, "segmentation": []}],
            "nothing to judge: 2 labelled objects, left out (crowd: 1; no outline: 1)",
        ),
        ([], "nothing to judge: the labels name 1 image and no object in it"),
    ],
)  # fmt: skip
def test_evaluate_with_nothing_to_judge_says_why(annotations: list[Any], told: str, place: Path) -> None:
    """R9: labels were given; the reason is in them."""
    path = coco_file(place / "labels.json", annotations)
    result = mobilesam(
        "evaluate", "--images", "photos", "--coco", path, "--teacher", "vit_nano", "--image-size", 64, "--points", 0,
        "--distances", "none", "--model", "a=vit_nano",
    )  # fmt: skip
    assert result.exit_code == 3
    assert told in result.stdout
    assert "(--points 0 leaves out the teacher's masks)" in result.stdout
    assert "nothing to compare with" not in result.stdout


def save_masks(folder: Path, size: tuple[int, int] = (96, 128)) -> Path:
    """Write the good object as a PNG mask of p1.jpg, with a second one below it."""
    folder.mkdir()
    values = np.zeros(size, np.uint8)
    values[20:60, 20:60], values[70:80, 20:60] = 1, 2
    Image.fromarray(values).save(folder / "p1.png")
    return folder


def test_png_masks_in_a_folder_of_their_own_are_labels(place: Path) -> None:
    """L3: NAME.png is the second common form of labels; each integer is an object, 0 is background."""
    arguments = ("evaluate", "--images", "photos", "--image-size", 64, "--model", "a=vit_nano", "--json")
    result = mobilesam(*arguments, "--label-masks", save_masks(place / "masks"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (judged(found), found["labels"]["names"]["matched"], found["images"]) == (2, 1, 2)
    shutil.rmtree(place / "masks")
    result = mobilesam(*arguments, "--label-masks", save_masks(place / "masks", (120, 128)))
    assert result.exit_code == 3
    (failed,) = json.loads(result.stdout)["failed"]
    assert failed["reason"] == (
        "p1.jpg: its mask p1.png: they are for an image of 128 x 120, this one is 128 x 96"
    )
    both = mobilesam(*arguments, "--label-masks", "masks", "--coco", "labels.json")
    assert both.exit_code == 2
    assert "two sources of labels" in both.stderr


@pytest.fixture
def store(place: Path) -> Path:
    """Store of the two photos and two more at 64 pixels, with random embeddings and vit_nano's head."""
    for number in (5, 7):
        Image.open(place / "photos" / "p1.jpg").rotate(number).save(place / "photos" / f"p{number}.jpg")
    head = {key: value.numpy() for key, value in load_head("vit_nano", None).items()}
    embeddings = np.random.default_rng(0).standard_normal((4, 256, 4, 4)).astype(np.float32)
    make_photo_store(place / "s.zarr", place / "photos", head=head, embeddings=embeddings)
    return place / "s.zarr"


def distilled(store: Path, *arguments: object) -> Result:
    with registered_small_student() as student:
        return mobilesam(
            "distill", "--store", store, "--student", student, "--objective", "coupled", "--epochs", 1,
            "--batch-size", 2, "--objects", 2, "--rounds", 1, "--device", "cpu", "--precision", "float32", "--out",
            "runs/a", *arguments,
        )  # fmt: skip


ALL_FOUR = [{**IMAGE, "id": number, "file_name": f"day/p{number}.jpg"} for number in (1, 3, 5, 7)]


def test_distill_learns_from_a_coco_file_which_is_part_of_what_the_run_is(store: Path, place: Path) -> None:
    """L3: distill --coco reads as evaluate --coco does, counts, and resumes only with the same labels."""
    objects = [{**GOOD, "id": 10 + number, "image_id": str(number)} for number in (1, 3, 5, 7)]
    objects += [{**one, "id": one["id"] + 10, "segmentation": []} for one in objects]
    gone = {**IMAGE, "id": 9, "file_name": "gone.jpg"}
    coco_file(place / "labels.json", objects, [*ALL_FOUR, gone])
    result = distilled(store, "--coco", "labels.json", "--json")
    assert result.exit_code == 0, result.output
    labels = json.loads(result.stdout)["labels"]
    run = Run.open("runs/a")
    trained = len(run.split.train)
    assert (labels["annotated"], labels["images"], labels["broken"], labels["empty"]) == (4, 4, 0, 0)
    assert (labels["objects"], labels["left_out"]) == (trained, {"no outline": trained})
    assert (labels["names"]["listed"], labels["names"]["first_missing"]) == (5, ["gone.jpg"])
    assert "labels.json: 4 of 5 listed images are among yours; not among them: gone.jpg" in result.stderr
    description = json.loads((run.path / "config.json").read_text())
    assert len(description["identity"]["coco_sha256"]) == 64
    assert description["labels"]["source"] == str(place / "labels.json")
    assert description["labels"]["names"]["matched"] == 4
    (place / "moved.json").write_bytes((place / "labels.json").read_bytes())
    again = distilled(store, "--coco", "moved.json")
    assert again.exit_code == 0, again.output
    assert f"{trained} of {2 * trained} labelled objects left out (no outline: {trained})" in again.stdout
    coco_file(place / "labels.json", objects[:6], ALL_FOUR)
    other = distilled(store, "--coco", "labels.json")
    assert other.exit_code == 3
    assert "coco_sha256" in other.stderr
    assert distilled(store).exit_code == 3  # the teacher's masks are other labels, too


def test_distill_learns_from_png_masks(store: Path, place: Path) -> None:
    """L3: images without a mask learn from the teacher's, as with SA-1B's files."""
    for name in ("p3", "p5", "p7"):
        if not (place / "masks").exists():
            save_masks(place / "masks")
        shutil.copy(place / "masks" / "p1.png", place / "masks" / f"{name}.png")
    (place / "masks" / "p7.png").unlink()
    result = distilled(store, "--label-masks", "masks", "--json")
    assert result.exit_code == 0, result.output
    labels, train = json.loads(result.stdout)["labels"], Run.open("runs/a").split.train
    assert labels["annotated"] == 3
    assert labels["objects"] == 2 * len(set(train) - {3})
    values = np.zeros((96, 128), np.uint8)
    values[30:60, 20:60] = 1
    Image.fromarray(values).save(place / "masks" / "p1.png")
    other = distilled(store, "--label-masks", "masks")
    assert other.exit_code == 3
    assert "label_masks_sha256" in other.stderr


def test_distill_refuses_labels_that_it_cannot_learn_from(store: Path, place: Path) -> None:
    """L3: no labelled training image, an objective without labels, or two sources are refused at once."""
    coco_file(place / "labels.json", [GOOD], [{**IMAGE, "file_name": "other.jpg"}])
    result = distilled(store, "--coco", "labels.json")
    assert result.exit_code == 3
    assert (
        "training images has a labelled object: labels.json: 0 of 1 listed images are among yours"
        in result.stderr
    )
    assert "other.jpg" in result.stderr
    assert not (place / "runs").exists()
    coco_file(place / "labels.json", [], ALL_FOUR)
    empty = distilled(store, "--coco", "labels.json")
    assert empty.exit_code == 3
    assert "labels.json lists no object of them" in empty.stderr
    for arguments, told in (
        (("--objective", "decoupled"), "the decoupled objective learns from no labels"),
        (("--labels", "teacher"), "labels is 'teacher'"),
        (("--label-masks", "photos"), "two sources of labels"),
    ):
        refused = distilled(store, "--coco", "labels.json", *arguments)
        assert refused.exit_code == 2
        assert told in refused.stderr


def test_a_sweep_gives_the_labels_to_the_runs_that_learn_from_them(store: Path, place: Path) -> None:
    """L3: sweep --coco trains the coupled run on one's own labels, and refuses them where no run uses them."""
    coco_file(place / "labels.json", [{**GOOD, "image_id": number} for number in (1, 3, 5, 7)], ALL_FOUR)
    with registered_small_student() as student:
        arguments = (
            "sweep", "--store", store, "--student", student, "--coco", "labels.json", "--epochs", 1,
            "--batch-size", 2, "--points", 1, "--device", "cpu", "--precision", "float32", "--out", "grid", "--json",
        )  # fmt: skip
        unused = mobilesam(*arguments)
        result = mobilesam(*arguments, "--objective", "decoupled,coupled", "--objects", 1, "--rounds", 1)
    assert unused.exit_code == 2
    assert "no run learns from labels: add coupled to --objective" in unused.stderr
    assert result.exit_code == 0, result.output
    labels = {
        run["options"]["objective"]: run["options"].get("labels") for run in json.loads(result.stdout)["runs"]
    }
    assert labels == {"decoupled": None, "coupled": "annotations"}
    (coupled,) = (
        run for run in json.loads(result.stdout)["runs"] if run["options"]["objective"] == "coupled"
    )
    assert len(Run.open(coupled["run"]).description.identity["coco_sha256"]) == 64


@pytest.mark.long
def test_a_student_trained_on_a_small_coco_file_is_above_the_untrained_one(place: Path) -> None:
    """L3: distill --objective coupled --coco learns what evaluate --coco judges by, on pictures it never saw."""
    train, test = write_shapes(place / "train", 24, seed=0), write_shapes(place / "test", 12, seed=1)
    with one_process_cluster() as cluster, registered_small_student() as student:
        made = mobilesam(
            "precompute", "--images", "train", "--out", "shapes.zarr", "--teacher", "vit_nano", "--image-size", 64,
            "--audit", 0, "--scheduler", cluster.scheduler_address,
        )  # fmt: skip
        assert made.exit_code == 0, made.output
        trained = mobilesam(
            "distill", "--store", "shapes.zarr", "--student", student, "--objective", "coupled", "--coco", train,
            "--epochs", 15, "--batch-size", 4, "--micro-batch", 4, "--lr", 5e-3, "--objects", 2, "--rounds", 1,
            "--device", "cpu", "--precision", "float32", "--out", "runs/shapes",
        )  # fmt: skip
        assert trained.exit_code == 0, trained.output
        save_student(build_student(student, 64, 0), place / "untrained.safetensors", student, 64, {})
        result = mobilesam(
            "evaluate", "--images", "test", "--coco", test, "--image-size", 64, "--head", "shapes.zarr", "--device",
            "cpu", "--model", "trained=runs/shapes", "--model", "untrained=untrained.safetensors", "--json",
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    models = {model["name"]: model["labels"] for model in json.loads(result.stdout)["models"]}
    found = {name: (labels["box"]["miou"], labels["center"]["miou"]) for name, labels in models.items()}
    print(found)  # noqa: T201 - the figures, for pytest -s
    for after, before in zip(found["trained"], found["untrained"], strict=True):
        assert after > before + 0.1, found
