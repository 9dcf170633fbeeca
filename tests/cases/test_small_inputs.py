"""Students that see photos smaller than SAM's square: trained, resumed, verified, and used by every command."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from gradient_photo import gradient_photo
from photo_store import make_photo_store
from PIL import Image
from segment_anything import SamPredictor

from mobilesam.cli import main
from mobilesam.common.signals import StopFlag
from mobilesam.distill import DistillConfig, DistillInterrupted, Run, distill, load_student
from mobilesam.predict import StudentPredictor, load_model
from mobilesam.sam import image_pixels, load_image
from mobilesam.sam.teacher import load_head, load_teacher
from mobilesam.store import EmbeddingStore

IMAGE_SIZE, SIZE = 128, 64
STUDENTS = ("tiny_vit", "timm:test_resnet")
EXAMPLES = Path(__file__).parents[2] / "examples"


class Trained(NamedTuple):
    """A student of small inputs with its run, and what `distill --json` printed."""

    student: str
    run: Path
    result: dict[str, Any]


def _mobilesam(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def _json(*args: object) -> dict[str, Any]:
    result = _mobilesam(*args, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight photos larger than SAM's square, and their store."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    (folder / "photos").mkdir()
    for number in range(8):
        gradient_photo(number, size=(150 + 3 * number, 200), steepness=4).save(
            folder / "photos" / f"p{number}.png"
        )
    teacher = load_teacher("vit_nano", None, image_size=IMAGE_SIZE)
    photos = [load_image(file.read_bytes(), IMAGE_SIZE) for file in sorted((folder / "photos").iterdir())]
    make_photo_store(
        folder / "store.zarr",
        folder / "photos",
        head={key: value.numpy() for key, value in load_head("vit_nano", None).items()},
        embeddings=np.concatenate([teacher.embed(image_pixels(photo, IMAGE_SIZE)) for photo in photos]),
        image_size=IMAGE_SIZE,
    )
    return folder


def _options(made: Path, student: str, run: Path) -> dict[str, Any]:
    return {
        "store": made / "store.zarr",
        "student": student,
        "student_size": SIZE,
        "epochs": 2,
        "batch_size": 4,
        "device": "cpu",
        "precision": "float32",
        "out": run,
    }


def _distill(**options: Any) -> tuple[str, ...]:
    return ("distill", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items()))


@pytest.fixture(scope="module", params=STUDENTS)
def trained(request: pytest.FixtureRequest, made: Path) -> Trained:
    run = made / request.param.replace(":", "-")
    return Trained(request.param, run, _json(*_distill(**_options(made, request.param, run))))


def _seen(photo: Path) -> torch.Tensor:
    """Return what the student gets of a photo: resized from the original by Pillow, normalised, padded."""
    with Image.open(photo) as opened:
        image = opened.convert("RGB")
    scale = SIZE / max(image.size)
    small = image.resize(
        [int(side * scale + 0.5) for side in image.size],  # type: ignore[arg-type]  # a pair
        Image.Resampling.BILINEAR,
    )
    mean, deviation = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    pixels = np.zeros((SIZE, SIZE, 3))
    pixels[: small.height, : small.width] = (np.asarray(small) - mean) / deviation
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float()


@torch.no_grad()
def test_the_student_learns_the_teachers_grid_from_the_small_photo(trained: Trained, made: Path) -> None:
    encoder, info = load_student(trained.run)
    assert (info["image_size"], info["student_size"]) == (IMAGE_SIZE, SIZE)
    verified = _json("verify", "--student", trained.run, "--split", "all", "--points", 0)
    assert verified["subject"]["student_size"] == SIZE
    with EmbeddingStore.open(made / "store.zarr") as store:
        stored = store.read(range(8)).to_float32()
    found = torch.cat([encoder(_seen(photo)) for photo in sorted((made / "photos").iterdir())]).numpy()
    assert found.shape == stored.shape == (8, 256, 8, 8)
    assert verified["mse"] == pytest.approx(float(((found - stored) ** 2).mean()), rel=1e-4)


def test_a_stopped_run_goes_on_to_the_same_student(trained: Trained, made: Path, tmp_path: Path) -> None:
    stop = StopFlag()

    def after_a_few_steps(progress: Any) -> None:
        if progress.step >= 2:
            stop.signum = 2

    options = _options(made, trained.student, tmp_path / "run")
    with pytest.raises(DistillInterrupted):
        distill(DistillConfig(**options), stop=stop, progress=after_a_few_steps, latest=False)
    result = _json(*_distill(**options))
    assert result["val"] == trained.result["val"]
    ours, theirs = (load_student(run)[0].state_dict() for run in (tmp_path / "run", trained.run))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_of_another_size_is_another_run(trained: Trained, made: Path) -> None:
    assert Run.open(trained.run).description.identity["student_size"] == SIZE
    options = {**_options(made, trained.student, trained.run), "student_size": 96}
    result = _mobilesam(*_distill(**options))
    assert result.exit_code == 3
    assert "student_size: 64 then, 96 now" in result.stderr
    del options["student_size"]
    assert "student_size: 64 then, None now" in _mobilesam(*_distill(**options)).stderr


def test_the_whole_size_is_the_student_without_the_option(made: Path, tmp_path: Path) -> None:
    options = {**_options(made, "timm:test_resnet", tmp_path / "run"), "student_size": IMAGE_SIZE}
    _json(*_distill(**options))
    del options["student_size"]
    assert _json(*_distill(**options))["already_finished"]
    assert "student_size" not in Run.open(tmp_path / "run").description.identity


@pytest.mark.parametrize("size", [16, 40, 144])
def test_a_size_that_cannot_be_is_refused_with_those_that_can(made: Path, tmp_path: Path, size: int) -> None:
    options = {**_options(made, "tiny_vit", tmp_path / "run"), "student_size": size}
    result = _mobilesam(*_distill(**options))
    assert result.exit_code == 3
    assert f"must be a multiple of 16 from 32 to 128, the image size; it is {size}" in result.stderr
    assert not (tmp_path / "run").exists()


@torch.no_grad()
def test_segment_gives_the_mask_of_the_small_photo(trained: Trained, made: Path, tmp_path: Path) -> None:
    photo = made / "photos" / "p2.png"
    result = _json(
        "segment", photo, "--student", trained.run, "--point", 120, 60, "--masks", tmp_path / "masks",
        "--out", tmp_path / "o.png", "--device", "cpu",
    )  # fmt: skip
    assert (result["image_size"], result["student_size"]) == (IMAGE_SIZE, SIZE)
    sam = load_model(trained.run).sam
    predictor = SamPredictor(sam)
    predictor.features = sam.image_encoder(_seen(photo))
    predictor.original_size, predictor.input_size = (156, 200), (100, 128)  # 156 * 128 / 200 is 99.84
    predictor.is_image_set = True
    masks, ious, _ = predictor.predict(np.array([[120, 60]]), np.array([1]))
    assert result["masks"][0]["predicted_iou"] == pytest.approx(ious.max(), abs=1e-4)
    with Image.open(result["masks"][0]["file"]) as mask:
        assert ((np.asarray(mask) > 0) != masks[ious.argmax()]).mean() <= 1e-3


def test_the_predictor_takes_both_orders_of_colours(trained: Trained, made: Path) -> None:
    with Image.open(made / "photos" / "p0.png") as opened:
        image = np.asarray(opened.convert("RGB"))
    predictor = StudentPredictor(load_model(trained.run).sam)
    predictor.set_image(image)
    features = predictor.features
    predictor.set_image(image[..., ::-1].copy(), "BGR")
    assert torch.equal(features, predictor.features)


def test_models_of_several_sizes_are_compared(trained: Trained, made: Path) -> None:
    result = _json(
        "evaluate", "--store", made / "store.zarr", "--model", f"small={trained.run}", "--model", "nano=vit_nano",
        "--points", 2, "--distances", 20, "--device", "cpu",
    )  # fmt: skip
    small, nano = result["models"]
    assert [(one["image_size"], one["student_size"]) for one in (small, nano)] == [(128, 64), (128, 128)]
    assert nano["teacher"]["point"]["miou"] > 0.95
    verified = _json("verify", "--student", trained.run, "--points", 2)
    assert small["teacher"]["point"]["miou"] == pytest.approx(verified["miou"], abs=1e-3)
    assert small["encoder_macs"] > 0


@pytest.mark.long
@torch.no_grad()
def test_the_export_takes_the_small_photo(trained: Trained, made: Path, tmp_path: Path) -> None:
    exported, photo = tmp_path / "exported", made / "photos" / "p2.png"
    result = _json("export", "--student", trained.run, "--out", exported)
    assert result["student_size"] == SIZE
    assert all(check["max_relative_difference"] <= check["limit"] for check in result["checks"].values())
    assert "model.pt" in result["left_out"]
    encoder = onnxruntime.InferenceSession(exported / "encoder.onnx")
    pixels = _seen(photo)
    (found,) = encoder.run(None, {"pixels": pixels.numpy()})
    wanted = load_student(trained.run)[0](pixels).numpy()
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    described = json.loads((exported / "model.json").read_text())
    assert (described["image_size"], described["student_size"]) == (IMAGE_SIZE, SIZE)
    assert described["preprocessing"]["resize"]["image_size"] == SIZE
    card = (exported / "README.md").read_text()
    assert "S is 128, g is S/16, s is 64." in card
    assert "the longer side has 64 pixels" in card
    assert load_student(exported)[1]["student_size"] == SIZE
    arguments = [exported / "encoder.onnx", exported / "decoder.onnx", photo, 120, 60, tmp_path / "onnx.png"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["segment_onnx.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / "segment_onnx.py"), run_name="__main__")
    ours = _json(
        "segment", photo, "--student", exported, "--point", 120, 60, "--masks", tmp_path / "masks",
        "--out", tmp_path / "o.png", "--device", "cpu",
    )  # fmt: skip
    with Image.open(tmp_path / "onnx.png") as one, Image.open(ours["masks"][0]["file"]) as other:
        assert ((np.asarray(one) > 0) != (np.asarray(other) > 0)).mean() <= 1e-3


def test_mobilesams_own_format_is_refused(made: Path, tmp_path: Path) -> None:
    run = made / "tiny_vit"
    if not run.exists():
        _json(*_distill(**_options(made, "tiny_vit", run)))
    result = _mobilesam("export", "--student", run, "--out", tmp_path / "model.pt")
    assert result.exit_code == 3
    assert "has no encoder of a smaller input, as this one of 64 pixels instead of 128" in result.stderr
    assert "give --out a folder" in result.stderr


def test_a_student_of_another_size_begins_with_the_weights_that_fit(
    trained: Trained, made: Path, tmp_path: Path
) -> None:
    options = _options(made, trained.student, tmp_path / "run") | {"init": trained.run, "student_size": 128}
    result = _mobilesam(*_distill(**options))
    assert result.exit_code == 0, result.output
    assert "was trained on inputs of 64 pixels, this student gets 128" in result.stderr
    init = Run.open(tmp_path / "run").description.init
    assert init is not None
    assert init["left_new"] == {}
    assert list(init["unused_in_file"]) == ["image_encoder"]


def test_the_decoder_is_finetuned_for_a_student_of_the_same_size_only(
    trained: Trained, made: Path, tmp_path: Path
) -> None:
    options = _options(made, trained.student, tmp_path / "run") | {
        "init": trained.run,
        "objective": "decoder",
        "objects": 2,
    }
    assert _json(*_distill(**options))["epochs"] == 2
    options |= {"student_size": 128, "out": tmp_path / "other"}
    result = _mobilesam(*_distill(**options))
    assert result.exit_code == 3
    assert "is a student of 64 pixels, this run's gets 128: give --student-size 64" in result.stderr


def test_masks_are_compared_in_the_frame_of_sams_square(made: Path, tmp_path: Path) -> None:
    options = _options(made, "timm:test_resnet", tmp_path / "run") | {
        "objective": "semi_coupled",
        "objects": 2,
    }
    trained = _json(*_distill(**options))
    verified = _json("verify", "--student", tmp_path / "run", "--points", 4)
    assert verified["miou"] == pytest.approx(trained["val"]["miou"], abs=1e-6)


def test_an_image_too_thin_for_the_small_input_is_named_with_the_mend(made: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(made / "photos", photos)
    gradient_photo(9, size=(3, 400)).save(photos / "thin.png")
    make_photo_store(
        tmp_path / "store.zarr",
        photos,
        head={"mask_decoder.w": np.zeros(3, np.float32)},
        embeddings=np.random.default_rng(1).standard_normal((9, 256, 8, 8), np.float32),
        image_size=IMAGE_SIZE,
    )
    options = _options(made, "timm:test_resnet", tmp_path / "run")
    result = _mobilesam(*_distill(**options | {"store": tmp_path / "store.zarr", "student_size": 32}))
    assert result.exit_code == 3
    assert "'thin.png' is too thin: 400 x 3 pixels would be resized to 32 x 0" in result.stderr
    assert "give a larger --student-size" in result.stderr
