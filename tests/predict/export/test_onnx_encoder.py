"""The encoder's ONNX file: what onnxruntime makes of it, for students of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from random_student import IMAGE_SIZE, ToyEncoder, save_random_student
from torch import Tensor, nn

from mobilesam import __version__
from mobilesam.distill import STUDENTS
from mobilesam.distill.students.backbones import build_deit_tiny
from mobilesam.distill.students.registry import StudentInfo
from mobilesam.predict import ExportConfig, PredictError, export, load_model
from mobilesam.predict.export.onnx_encoder import LIMIT, export_encoder, synthetic_pixels
from mobilesam.sam import preprocessing_recipe


class DecidingEncoder(ToyEncoder):
    """Looks at the pixels to decide what to compute."""

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        emb_BCHW = super().forward(pixels_BCHW)
        return emb_BCHW if bool(pixels_BCHW.sum() > 0) else -emb_BCHW


class CountingEncoder(ToyEncoder):
    """Its result depends on a number that Python makes of the pixels: torch.export takes it for a constant."""

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return super().forward(pixels_BCHW) * len(str(pixels_BCHW.sum().item()))


def shallow_deit(image_size: int, student_size: int) -> nn.Module:
    """The first two of its twelve blocks, which are alike: exporting takes as long as there are blocks."""
    student = build_deit_tiny(image_size, student_size)
    student.backbone.blocks = student.backbone.blocks[:2]
    return student


@pytest.fixture(autouse=True)
def _small_students_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    infos = {
        name: StudentInfo(name=name, summary="", build=build)
        for name, build in (
            ("toy", ToyEncoder),
            ("counting", CountingEncoder),
            ("deciding", DecidingEncoder),
            ("shallow_deit", shallow_deit),
        )
    }
    monkeypatch.setattr("mobilesam.distill.students.registry.STUDENTS", {**STUDENTS, **infos})


@pytest.mark.parametrize(
    "name",
    [
        "toy",
        "tiny_vit",
        "shallow_deit",
        "timm:resnet18",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in (
                "deit_tiny",
                "tiny_vit_11m",
                "tiny_vit_21m",
                "timm:swin_tiny_patch4_window7_224",
                "timm:mobilevit_s",
            )
        ),
    ],
)
def test_every_kind_of_student_embeds_any_batch_as_torch_does(name: str, tmp_path: Path) -> None:
    student = save_random_student(tmp_path / "student.safetensors", name)
    out = tmp_path / "mine-encoder.onnx"
    result = export(ExportConfig(student=student, out=out))
    assert {path.name for path in tmp_path.iterdir()} == {"student.safetensors", "mine-encoder.onnx"}
    assert result["checks"]["mine-encoder.onnx"]["max_relative_difference"] < LIMIT
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape[1:], given.type) == (
        "pixels",
        [3, IMAGE_SIZE, IMAGE_SIZE],
        "tensor(float)",
    )
    assert (returned.name, returned.shape[1:]) == (
        "image_embeddings",
        [256, IMAGE_SIZE // 16, IMAGE_SIZE // 16],
    )
    encoder = load_model(student).sam.image_encoder
    for batch in (1, 2, 5):
        pixels_BCHW = synthetic_pixels(batch, IMAGE_SIZE, seed=batch)
        with torch.no_grad():
            wanted = encoder(pixels_BCHW).numpy()
        (found,) = session.run(None, {"pixels": pixels_BCHW.numpy()})
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_the_file_tells_what_it_is_and_how_images_are_prepared(tmp_path: Path) -> None:
    student = save_random_student(
        tmp_path / "s.safetensors", "toy", teacher="vit_h", checkpoint_sha256="ab" * 32
    )
    export(ExportConfig(student=student, out=tmp_path / "encoder.onnx"))
    proto = onnx.load(tmp_path / "encoder.onnx")
    onnx.checker.check_model(proto, full_check=True)
    told = {prop.key: prop.value for prop in proto.metadata_props}
    assert json.loads(told["preprocessing"]) == preprocessing_recipe(IMAGE_SIZE)
    assert (told["student"], told["teacher"], told["image_size"]) == ("toy", "vit_h", str(IMAGE_SIZE))
    assert told["checkpoint_sha256"] == "ab" * 32
    versions = json.loads(told["versions"])
    assert versions["mobilesam"] == __version__
    assert versions["onnxruntime"] == onnxruntime.__version__


def test_the_file_tells_nothing_of_the_machine_that_made_it(tmp_path: Path) -> None:
    student = save_random_student(tmp_path / "s.safetensors", "toy")
    export(ExportConfig(student=student, out=tmp_path / "encoder.onnx"))
    data = (tmp_path / "encoder.onnx").read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in data
    assert str(Path(__file__).parents[3]).encode() not in data


def test_the_same_student_gives_the_same_bytes(tmp_path: Path) -> None:
    student = save_random_student(tmp_path / "s.safetensors", "toy")
    for name in ("a-encoder.onnx", "b-encoder.onnx"):
        export(ExportConfig(student=student, out=tmp_path / name))
    assert (tmp_path / "a-encoder.onnx").read_bytes() == (tmp_path / "b-encoder.onnx").read_bytes()


def test_a_student_that_torch_can_not_export_is_one_clear_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    student = save_random_student(tmp_path / "s.safetensors", "deciding")
    with pytest.raises(PredictError, match="torch can't export the encoder deciding to ONNX: ") as caught:
        export(ExportConfig(student=student, out=tmp_path / "encoder.onnx"))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_student_that_torch_exports_wrongly_is_caught(tmp_path: Path) -> None:
    student = save_random_student(tmp_path / "s.safetensors", "counting")
    with pytest.raises(PredictError, match=r"encoder\.onnx differs from torch"):
        export(ExportConfig(student=student, out=tmp_path / "encoder.onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_weights_that_one_file_can_not_hold_are_refused(tmp_path: Path) -> None:
    model = load_model(save_random_student(tmp_path / "s.safetensors", "toy"))
    huge = nn.Module()
    huge.weight = nn.Parameter(torch.empty(2**29, device="meta"), requires_grad=False)
    model.sam.image_encoder.huge = huge
    with pytest.raises(PredictError, match=r"2,14\d,\d{3},\d{3} bytes of weights"):
        export_encoder(model)


def test_the_made_up_pictures_are_padded_as_photos_are() -> None:
    pixels_BCHW = synthetic_pixels(3, 48)
    assert pixels_BCHW.shape == (3, 3, 48, 48)
    assert not pixels_BCHW[0, :, :, 32:].any()
    assert not pixels_BCHW[1, :, 36:].any()
    assert pixels_BCHW[2, :, 47, 47].any()
    assert float(pixels_BCHW.std()) > 0.3
