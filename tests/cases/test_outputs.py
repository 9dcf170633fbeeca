"""`--out` and every other option that names an output replaces only what the tool made itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from photo_store import make_photo_store
from PIL import Image
from random_student import save_random_student

from mobilesam.cli import main
from mobilesam.distill import build_student, save_student
from mobilesam.predict.export.bundle import check_folder
from mobilesam.sam.teacher import load_head

TEACHER = ("--teacher", "vit_nano", "--image-size", "64")


def _mobilesam(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


@pytest.fixture
def photos(place: Path) -> Path:
    (place / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(
            place / "photos" / f"{number}.png"
        )
    return place / "photos"


def _refused(path: Path, *args: object) -> None:
    """The command fails before it works, in at most two lines that name the file, and the file is as it was."""
    before = path.read_bytes()
    result = _mobilesam(*args)
    assert result.exit_code in (2, 3), result.output
    told = (
        result.stderr.partition("\n\n")[2] if result.exit_code == 2 else result.stderr
    )  # click's usage before it
    assert path.name in told
    assert "another name" in told
    assert len(told.splitlines()) <= 2
    assert "bug" not in result.stderr
    assert result.stdout == ""
    assert path.read_bytes() == before


def _replaced(path: Path, *args: object) -> None:
    """The command makes the file, makes it again, and refuses it once something else is appended."""
    for _ in range(2):
        result = _mobilesam(*args)
        assert result.exit_code == 0, result.output
        assert path.stat().st_size > 100
    with open(path, "ab") as file:
        file.write(b"mine")
    _refused(path, *args)
    path.unlink()


def test_export_replaces_its_own_pt_and_no_other_weights(place: Path) -> None:
    """R2: the downloaded mobile_sam.pt, training's checkpoints, an empty file and a fine-tuned export stay."""
    student = save_random_student(place / "student.safetensors")
    out = place / "mobile_sam.pt"
    command = ("export", "--student", student, "--out", out)
    for content in (b"the weights that I downloaded", b""):
        out.write_bytes(content)
        _refused(out, *command)
    out.unlink()
    for _ in range(2):
        assert _mobilesam(*command).exit_code == 0
    weights = torch.load(out, weights_only=True)
    torch.save(weights, out)  # as after a few steps of fine-tuning
    _refused(out, *command)
    assert _mobilesam("export", "--student", student, "--out", student).exit_code == 2
    _refused(out, "export", "--student", out, "--out", out, "--image-size", 64)


def test_segment_replaces_its_own_pictures_and_json_and_no_photo(photos: Path) -> None:
    """R2: segment's --out, --rle and --masks."""
    photo, other = photos / "0.png", photos / "1.png"
    command = ("segment", photo, *TEACHER, "--point", 20, 20)
    _refused(photo, *command, "--out", photo)
    _refused(other, *command, "--out", other)
    labels = photos / "1.json"
    labels.write_text(json.dumps({"image": {"image_id": 1}, "annotations": []}))
    _refused(labels, *command, "--rle", labels)
    assert _mobilesam(*command, "--masks", photos).exit_code == 3
    for name in ("o.png", "o.jpg"):
        _replaced(photos / name, *command, "--out", photos / name)
    _replaced(photos / "o.json", *command, "--rle", photos / "o.json")
    mask = photos.parent / "masks" / "000.png"
    assert _mobilesam(*command, "--masks", mask.parent).exit_code == 0
    _refused(mask, *command, "--out", mask)


def test_reports_replace_their_own_kind_and_no_other_page(photos: Path) -> None:
    """R2: the reports of evaluate, verify and precompute."""
    page = photos.parent / "page.html"
    store = ("precompute", "--images", photos, "--out", "s.zarr", *TEACHER, "--audit", 0)
    page.write_text("<html><head></head>mine</html>")
    _refused(page, *store, "--performance-report", page)
    assert _mobilesam(*store).exit_code == 0
    student = save_random_student(photos.parent / "student.safetensors", "timm:test_resnet")
    evaluate = (
        "evaluate",
        "--store",
        "s.zarr",
        "--model",
        f"a={student}",
        "--points",
        1,
        "--distances",
        "none",
    )
    verify = ("verify", "--store", "s.zarr", "--student", student, "--split", "all", "--points", 0)
    _refused(page, *evaluate, "--report", page)
    _refused(page, *verify, "--report", page)
    manifest = photos.parent / "s.zarr" / "zarr.json"
    _refused(manifest, *verify, "--report", manifest)
    page.unlink()
    for command, other in ((evaluate, verify), (verify, evaluate)):
        assert _mobilesam(*command, "--report", page).exit_code == 0
        _refused(page, *other, "--report", page)
        page.unlink()
        _replaced(page, *command, "--report", page)


def _folder_refused(folder: Path, *args: object) -> None:
    before: dict[str, Any] = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = _mobilesam(*args)
    assert result.exit_code == 3, result.output
    assert "bug" not in result.stderr
    assert len(result.stderr.splitlines()) <= 2
    assert {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_never_written_into(photos: Path) -> None:
    """R2: folders whose files happen to have names of ours."""
    make_store = ("precompute", "--images", photos, *TEACHER, "--audit", 0, "--out")
    assert _mobilesam(*make_store, "s.zarr").exit_code == 0
    student = save_random_student(photos.parent / "student.safetensors", "timm:test_resnet")
    train = ("--store", "s.zarr", "--epochs", 1, "--batch-size", 2, "--out")
    names = (
        "config.json",
        "results.json",
        "split.json",
        "report.html",
        "tables.md",
        "zarr.json",
        "model.json",
    )
    for name in names:
        folder = photos.parent / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text(json.dumps({"train": [1, 2], "format": "other"}))
        _folder_refused(folder, "export", "--student", student, "--out", folder)
        _folder_refused(folder, *make_store, folder)
        _folder_refused(folder, "distill", *train, folder)
        _folder_refused(folder, "sweep", *train, folder)


@pytest.mark.long
def test_a_folder_left_by_a_kill_between_renames_is_replaced(place: Path) -> None:
    """R2: the next export asked to delete model.safetensors, which the killed one had renamed already."""
    student = save_random_student(place / "student.safetensors", "timm:test_resnet")
    command = ("export", "--student", student, "--out", place / "exported")
    assert _mobilesam(*command).exit_code == 0
    described = place / "exported" / "model.json"
    described.write_text('{"format": "mobilesam model 1", "files": {}}')  # an older export's
    check_folder(place / "exported")
    described.unlink()
    (place / "exported" / "decoder.onnx").unlink()
    assert _mobilesam(*command).exit_code == 0
    described.unlink()
    (place / "exported" / "README.md").unlink()  # then nothing says that the folder is an export's
    result = _mobilesam(*command)
    assert (result.exit_code, "such as model.safetensors" in result.stderr) == (3, True)


def test_nothing_is_written_into_a_store(photos: Path, place: Path) -> None:
    """T5: a run or an export in a store is lost with it."""
    student = save_random_student(place / "student.safetensors")
    head = {key: value.numpy() for key, value in load_head("vit_nano", None).items()}
    embeddings = np.zeros((3, 256, 4, 4), np.float32)
    make_photo_store(place / "store.zarr", photos, head=head, embeddings=embeddings)
    for command in (
        ("export", "--student", student, "--out", "store.zarr/new"),
        ("export", "--student", student, "--out", "store.zarr/embeddings/new.pt"),
        ("segment", photos / "0.png", *TEACHER, "--point", 1, 1, "--out", "store.zarr/new.png"),
        ("distill", "--store", "store.zarr", "--images", photos, "--out", "store.zarr/new"),
    ):
        result = _mobilesam(*command)
        assert (result.exit_code, result.stdout) == (3, ""), result.output
        assert f"lies in the store {place / 'store.zarr'}" in result.stderr
    assert not list((place / "store.zarr").rglob("new*"))


@pytest.mark.long
def test_an_encoder_is_exported_without_a_head(place: Path) -> None:
    """R2: `export --out encoder.onnx` asked for a head, which an encoder doesn't need."""
    student = place / "student.safetensors"
    save_student(build_student("timm:test_resnet", 64, 0).eval(), student, "timm:test_resnet", 64, {})
    result = _mobilesam("export", "--student", student, "--out", "encoder.onnx", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["head"] is None
    result = _mobilesam("export", "--student", student, "--out", "decoder.onnx")
    assert (result.exit_code, "holds no mask decoder" in result.stderr) == (3, True)
