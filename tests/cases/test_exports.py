"""Exported files: their content, and use by others' tools.

Shapes: P prompts, N points of one prompt, 2 (x, y).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.utils
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner, Result
from onnx import TensorProto
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from PIL import Image
from random_student import IMAGE_SIZE, save_random_student
from segment_anything import SamPredictor

from mobilesam.cli import main
from mobilesam.predict import load_model

PARTS = ("encoder", "decoder")
STUDENTS = (
    "timm:test_resnet",
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in (
            "tiny_vit",
            "deit_tiny",
            "repvit_m1_1",
            "timm:efficientvit_b0",
            "mobilenetv4_conv_medium",
            "timm:mobilenetv3_small_100",
        )
    ),
)
PHOTO_SIZES = [(97, 211), (211, 97), (300, 9), (64, 64), (1023, 767)]


def _mobilesam(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module", params=STUDENTS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an export, made by the command; beside it the student."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("export")
    student = save_random_student(folder / "student.safetensors", request.param)
    result = _mobilesam("export", "--student", student, "--out", folder / "exported", "--json")
    assert result.exit_code == 0, result.output
    for name, described in json.loads(result.stdout)["onnx"].items():
        assert described["notes"] == [], name
    return folder / "exported"


@pytest.fixture
def _quiet() -> Iterator[None]:
    """Quantisation's advice goes to the root logger, which gets a handler for it."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    yield
    root.handlers[:] = handlers


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _pixels(batch: int) -> dict[str, np.ndarray]:
    return {
        "pixels": np.random.default_rng(0).normal(size=(batch, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    }


def _prompts(
    emb: np.ndarray, coords_PN2: np.ndarray, labels_PN: np.ndarray, height: int, width: int
) -> dict[str, Any]:
    return {
        "image_embeddings": emb,
        "point_coords": coords_PN2.astype(np.float32),
        "point_labels": labels_PN.astype(np.float32),
        "mask_input": np.zeros((1, 1, IMAGE_SIZE // 4, IMAGE_SIZE // 4), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array([height, width], np.float32),
    }


def _inputs(folder: Path, part: str) -> dict[str, Any]:
    if part == "encoder":
        return _pixels(2)
    (emb,) = _session(folder / "encoder.onnx").run(None, _pixels(1))
    coords = np.random.default_rng(1).random((2, 3, 2)) * IMAGE_SIZE
    return _prompts(emb, coords, np.array([[1, 0, -1], [1, 2, 3]]), 1080, 1920)


@pytest.mark.parametrize("part", PARTS)
def test_a_file_has_no_doubles_no_functions_and_a_format_that_was_chosen(part: str, exported: Path) -> None:
    """E1: TensorRT and browsers have no DOUBLE; opset, IR version and the oldest onnxruntime are told."""
    model = onnx.load(exported / f"{part}.onnx")
    onnx.checker.check_model(model, full_check=True)
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    types = {v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.data_type for tensor in graph.initializer}
    types |= {a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
    assert types <= {TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL}
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    assert len(model.functions) == 0
    assert (model.ir_version, [(one.domain, one.version) for one in model.opset_import]) == (8, [("", 18)])
    told = json.loads((exported / "model.json").read_text())["onnx"][f"{part}.onnx"]
    assert told == {"opset": 18, "ir_version": 8, "oldest_onnxruntime": "1.14", "notes": []}
    card = (exported / "README.md").read_text()
    assert "opset 18, IR version 8: onnxruntime 1.14 or later" in card


def test_the_size_is_needed_by_masks_alone_which_can_be_cut_off_as_the_card_says(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E1: `orig_im_size` is float32; the card's own lines give a decoder without it."""
    sizes = {value.name: value.type for value in _session(exported / "decoder.onnx").get_inputs()}
    assert sizes["orig_im_size"] == "tensor(float)"
    card = (exported / "README.md").read_text()
    assert "`orig_im_size` is float32" in card
    lines = card[card.index("    import onnx.utils") :].split("\n\n")[0]
    shutil.copy(exported / "decoder.onnx", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.removeprefix("    ") for line in lines.splitlines()))
    inputs = _inputs(exported, "decoder")
    wanted = _session(exported / "decoder.onnx").run(["iou_predictions", "low_res_masks"], inputs)
    del inputs["orig_im_size"]
    for found, right in zip(_session(tmp_path / "low.onnx").run(None, inputs), wanted, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5 * np.abs(right).max())


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("part", PARTS)
def test_a_file_quantises_with_symbolic_shape_inference(part: str, exported: Path, tmp_path: Path) -> None:
    """E2: quant_pre_process needs no skip_symbolic_shape; 8-bit weights load, the embedding keeps its direction."""
    quant_pre_process(exported / f"{part}.onnx", tmp_path / "prepared.onnx", skip_symbolic_shape=False)
    inputs = _inputs(exported, part)
    wanted = _session(exported / f"{part}.onnx").run(None, inputs)
    for source in (exported / f"{part}.onnx", tmp_path / "prepared.onnx"):
        quantize_dynamic(source, tmp_path / "8bit.onnx", weight_type=QuantType.QUInt8)
        found = _session(tmp_path / "8bit.onnx").run(None, inputs)
        assert [one.shape for one in found] == [one.shape for one in wanted]
        if part == "encoder":
            one, other = found[0].ravel(), wanted[0].ravel()
            assert float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)) > 0.9
    assert "All of this works with both files." in (exported / "README.md").read_text()


@pytest.mark.parametrize("part", PARTS)
def test_a_halved_file_gives_nearly_the_same(part: str, exported: Path, tmp_path: Path) -> None:
    """E3: finite and within 1% of the greatest magnitude, masks of a large photo as well."""
    model = onnx.load(exported / f"{part}.onnx")
    onnx.save(convert_float_to_float16(model, keep_io_types=True), tmp_path / "half.onnx")
    inputs = _inputs(exported, part)
    wanted = _session(exported / f"{part}.onnx").run(None, inputs)
    for found, right in zip(_session(tmp_path / "half.onnx").run(None, inputs), wanted, strict=True):
        assert np.isfinite(found).all()
        assert np.abs(found - right).max() < 0.01 * np.abs(right).max()


def test_several_prompts_give_what_each_gives_alone_and_what_torch_gives(exported: Path) -> None:
    """E4: boxes and points in one batch, for portraits, strips, and photos larger and smaller than the square."""
    decoder = _session(exported / "decoder.onnx")
    predictor = SamPredictor(load_model(exported).sam)
    rng = np.random.default_rng(0)
    for width, height in PHOTO_SIZES:
        predictor.set_image(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        emb = predictor.get_image_embedding().numpy()
        boxes = np.array(
            [[0, 0, width / 2, height / 2], [width / 4, height / 4, width, height], [0, 0, width, height]]
        )
        point = np.array([[width * 0.4, height * 0.6], [0, 0]])
        coords_PN2 = predictor.transform.apply_coords(
            np.concatenate([boxes.reshape(-1, 2, 2), point[None]]), (height, width)
        )
        labels_PN = np.array([[2, 3], [2, 3], [2, 3], [1, -1]])
        together = decoder.run(None, _prompts(emb, coords_PN2, labels_PN, height, width))
        assert together[0].shape == (4, 4, height, width)
        scale = np.abs(together[0]).max()
        for index in range(4):
            alone = decoder.run(None, _prompts(emb, coords_PN2[[index]], labels_PN[[index]], height, width))
            assert np.abs(alone[0][0] - together[0][index]).max() < 1e-5 * scale
            asked = (
                {"box": boxes[index]}
                if index < 3
                else {"point_coords": point[:1], "point_labels": np.array([1])}
            )
            for multimask, masks in ((False, slice(0, 1)), (True, slice(1, 4))):
                wanted, _, _ = predictor.predict(**asked, multimask_output=multimask, return_logits=True)
                assert np.abs(together[0][index, masks] - wanted).max() < 1e-3 * scale


def test_segment_takes_the_export_for_a_portrait_and_refuses_a_thread(exported: Path, tmp_path: Path) -> None:
    """E4: a photo so thin that it would be resized to nothing is refused, in one line."""
    Image.new("RGB", (97, 211), (200, 30, 60)).save(tmp_path / "portrait.png")
    Image.new("RGB", (1, 400)).save(tmp_path / "thread.png")
    out = ("--student", exported, "--box", 0, 0, 1, 60, "--out", tmp_path / "o.png", "--json")
    done = _mobilesam("segment", tmp_path / "portrait.png", *out)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["original_size"] == [211, 97]
    refused = _mobilesam("segment", tmp_path / "thread.png", *out)
    assert refused.exit_code == 3
    assert "too thin" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("part", PARTS)
def test_a_file_travels_alone_and_older_format_versions_are_written(
    part: str, exported: Path, tmp_path: Path
) -> None:
    """E5: no weights in a second file; with another IR version, as people set it for older runtimes, it loads."""
    moved = shutil.copy(exported / f"{part}.onnx", tmp_path / "x.onnx")
    model = onnx.load(moved, load_external_data=False)
    assert all(tensor.data_location == TensorProto.DEFAULT for tensor in model.graph.initializer)
    inputs = _inputs(exported, part)
    wanted = _session(exported / f"{part}.onnx").run(None, inputs)
    for version in (None, 8, 7):
        if version is not None:
            model.ir_version = version
            onnx.save(model, tmp_path / "x.onnx")
        for found, right in zip(_session(tmp_path / "x.onnx").run(None, inputs), wanted, strict=True):
            np.testing.assert_array_equal(found, right)


def test_a_moved_pt_gives_the_students_masks(tmp_path: Path) -> None:
    """E5: model.pt alone, in another folder, under another name."""
    student = save_random_student(tmp_path / "student.safetensors")
    (tmp_path / "moved").mkdir()
    out = tmp_path / "moved" / "weights.pt"
    assert _mobilesam("export", "--student", student, "--out", out).exit_code == 0
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(
        tmp_path / "p.png"
    )
    pictures = []
    for source in ((student,), (out, "--image-size", 64)):
        result = _mobilesam(
            "segment",
            tmp_path / "p.png",
            "--student",
            *source,
            "--point",
            40,
            40,
            "--out",
            tmp_path / "o.png",
        )
        assert result.exit_code == 0, result.output
        with Image.open(tmp_path / "o.png") as picture:
            pictures.append(np.asarray(picture).copy())
    np.testing.assert_array_equal(*pictures)
