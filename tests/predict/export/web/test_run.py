"""`export --format web`: what is refused before any work, and what the folder holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from PIL import Image
from random_student import ToyEncoder

from mobilesam.cli import main
from mobilesam.distill import STUDENTS, save_student
from mobilesam.distill.students.registry import StudentInfo
from mobilesam.predict import ExportConfig, PredictError, export, load_model
from mobilesam.predict.export import run as exporter
from mobilesam.predict.export.run import export_lines
from mobilesam.predict.export.web.folder import read_demo
from mobilesam.predict.export.web.networks import half_weights
from mobilesam.predict.export.web.run import web_image_size
from mobilesam.predict.export.web.runtime import BUILDS, SHA256
from mobilesam.sam import preprocessing_recipe
from mobilesam.sam.weights.download import file_sha256

PHOTOS = Path(__file__).parents[4] / "examples" / "photos"


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    """A folder with files in the place of onnxruntime-web's."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    for name in SHA256:
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.fixture
def small(head: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student of one convolution at 64 pixels with vit_nano's head."""
    info = StudentInfo(name="toy", summary="one convolution", build=ToyEncoder)
    monkeypatch.setattr("mobilesam.distill.students.registry.STUDENTS", {**STUDENTS, "toy": info})
    torch.manual_seed(0)
    save_student(ToyEncoder(64, 64), tmp_path / "toy.safetensors", "toy", 64, {"teacher": "vit_nano"}, head)
    return tmp_path / "toy.safetensors"


@pytest.fixture
def demo(small: Path, runtime: Path, tmp_path: Path) -> Path:
    """A web demo of that student."""
    config = ExportConfig(
        student=small, format="web", out=tmp_path / "demo", runtime_dir=runtime,
        examples=[PHOTOS / "coffee.jpg", PHOTOS / "cat.png"],
    )  # fmt: skip
    result = export(config)
    assert result["kind"] == "web"
    assert result["files"].keys() == read_demo(config.out)["listing"].keys() | {"demo.json"}  # type: ignore[index]
    for name, file in result["files"].items():
        assert file == {
            "bytes": (config.out / name).stat().st_size, "sha256": file_sha256(config.out / name),
        }  # fmt: skip
    lines = "\n".join(export_lines(result))
    assert "page, onnxruntime-web, examples" in lines
    assert "not of onnxruntime-web 1.30.0" in lines
    assert f"Next: mobilesam demo {config.out}" in lines
    return config.out


def test_a_demo_has_the_page_the_networks_and_what_the_page_must_know(
    demo: Path, small: Path, runtime: Path
) -> None:
    description = read_demo(demo)
    assert description is not None
    assert (description["student"], description["image_size"], description["teacher"]) == (
        "toy",
        64,
        "vit_nano",
    )
    assert description["preprocessing"] == preprocessing_recipe(64)
    for build, names in BUILDS.items():
        paths = [description["runtime"][build][kind]["path"] for kind in ("script", "program")]
        assert paths == [f"./runtime/{name}" for name in names]
    assert b"MIT License" in (demo / "runtime/LICENSE").read_bytes()
    assert "Cross-Origin-Embedder-Policy: require-corp" in (demo / "_headers").read_text()
    assert "toy at 64 pixels, distilled from vit_nano" in (demo / "README.md").read_text()
    for example, name in zip(description["examples"], ("coffee", "cat"), strict=True):
        picture = Image.open(demo / example["path"])
        assert (picture.width, picture.height, name) == (example["width"], example["height"], example["alt"])
    for file in description["files"].values():
        assert (demo / file["path"]).stat().st_size == file["bytes"]
    _check_networks(demo, small, description)


def _check_networks(demo: Path, student: Path, description: dict) -> None:
    sam = load_model(student).sam
    encoder = onnxruntime.InferenceSession(demo / "networks/encoder.onnx")
    decoder = onnxruntime.InferenceSession(demo / "networks/decoder-lowres.onnx")
    pixels = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        wanted = sam.image_encoder(pixels)
    (embedding,) = encoder.run(None, {"pixels": pixels.numpy()})
    assert np.abs(embedding - wanted.numpy()).max() < 2e-3 * float(wanted.abs().max())
    check = description["check"]
    assert np.allclose(
        embedding.ravel()[:: check["step"]][: len(check["values"])], check["values"], atol=1e-5
    )
    low, ious = decoder.run(
        None,
        {
            "image_embeddings": embedding,
            "point_coords": np.array([[[20, 30], [0, 0]]], np.float32),
            "point_labels": np.array([[1, -1]], np.float32),
            "mask_input": np.zeros((1, 1, 16, 16), np.float32),
            "has_mask_input": np.zeros(1, np.float32),
        },
    )
    sparse, dense = sam.prompt_encoder(
        points=(torch.tensor([[[20.0, 30.0]]]), torch.tensor([[1]])), boxes=None, masks=None
    )
    with torch.no_grad():
        masks, quality = sam.mask_decoder.predict_masks(
            torch.from_numpy(embedding), sam.prompt_encoder.get_dense_pe(), sparse, dense
        )
    assert np.abs(low - masks.numpy()).max() < 5e-3 * float(masks.abs().max())
    assert np.abs(ious - quality.numpy()).max() < 5e-3


def test_half_weights_halve_a_file_and_keep_small_values() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"]), onnx.helper.make_node("Add", ["y", "b"], ["z"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, 64))],
        [onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, (1, 64))],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(weight[0], "b")],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    data = half_weights(proto.SerializeToString())
    assert len(data) < 0.6 * len(proto.SerializeToString())
    x = np.ones((1, 64), np.float32)
    (found,) = onnxruntime.InferenceSession(data).run(None, {"x": x})
    assert np.allclose(found, x @ weight.astype(np.float16).astype(np.float32) + weight[0], atol=1e-4)


def test_a_weight_beyond_float16_is_refused() -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["w"], ["y"])],
        "g",
        [],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (2048,))],
        [numpy_helper.from_array(np.full(2048, 1e6, np.float32), "w")],
    )
    with pytest.raises(PredictError, match="the weight w has values beyond float16's 65504"):
        half_weights(onnx.helper.make_model(graph).SerializeToString())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"out": "taken"}, "holds 1 file that no web demo has"),
        ({"examples": ["text.jpg"]}, "--examples text.jpg"),
        ({"runtime_dir": "empty"}, "--runtime-dir empty lacks ort.wasm"),
    ],
)
def test_everything_that_can_fail_early_fails_before_a_model_is_loaded(
    options: dict, reason: str, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("")
    (tmp_path / "text.jpg").write_text("no photo")
    (tmp_path / "empty").mkdir()
    given = {"out": "demo", "runtime_dir": str(runtime), **options}
    with pytest.raises(Exception, match=reason):
        export(ExportConfig(student=Path("run"), format="web", **given))


@pytest.mark.parametrize("option", [["--examples", "a.jpg"], ["--runtime-dir", "dist"]])
def test_options_of_the_page_without_it_are_wrong_usage(option: list[str]) -> None:
    done = CliRunner().invoke(main, ["export", "--out", "exported", *option])
    assert done.exit_code == 2
    assert f"{option[0]} goes with --format web" in done.stderr


def test_a_file_that_records_no_size_is_exported_at_512(
    mobile_sam_pt: Path, run: Path, lone_student: Path
) -> None:
    assert web_image_size(mobile_sam_pt, None) == 512
    assert web_image_size(mobile_sam_pt, 256) == 256
    assert web_image_size(run, None) is None
    assert web_image_size(lone_student, None) is None
    assert web_image_size(None, None) is None
