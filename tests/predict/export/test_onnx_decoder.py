"""The decoder's ONNX file against segment_anything's own SamPredictor."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from random_student import IMAGE_SIZE, save_random_student
from segment_anything import SamPredictor

from mobilesam.predict import ExportConfig, Model, PredictError, export, load_model
from mobilesam.predict.export.onnx_decoder import (
    LIMIT,
    Decoder,
    _with_fused_norms,
    bilinear_matrix,
    halves_rounded_down,
)
from mobilesam.sam import resized_size

SIDE = IMAGE_SIZE // 4
SIZES = [(40, 60), (64, 64), (333, 97), (20, 64), (101, 640), (1, 1), (1, 40)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("decoder")
    student = save_random_student(folder / "student.safetensors")
    return student, export(ExportConfig(student=student, out=folder / "decoder.onnx"))


@pytest.fixture(scope="module")
def model(made: tuple[Path, dict[str, Any]]) -> Model:
    return load_model(made[0])


@pytest.fixture(scope="module")
def session(made: tuple[Path, dict[str, Any]]) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(made[1]["out"], providers=["CPUExecutionProvider"])


def _image(height: int, width: int) -> np.ndarray:
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(height)) * 255
    fine = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 255)
    return fine[0].permute(1, 2, 0).numpy().astype(np.uint8)


def _run(
    session: onnxruntime.InferenceSession,
    predictor: SamPredictor,
    coords: np.ndarray,
    labels: np.ndarray,
    mask: np.ndarray | None = None,
) -> list[np.ndarray]:
    """The decoder on prompts in pixels of the photo; `coords` (P, N, 2), `labels` (P, N), `mask` (M, 1, 4g, 4g)."""
    size = predictor.original_size
    return session.run(
        None,
        {
            "image_embeddings": predictor.get_image_embedding().numpy(),
            "point_coords": predictor.transform.apply_coords(coords, size).astype(np.float32),
            "point_labels": labels.astype(np.float32),
            "mask_input": np.zeros((1, 1, SIDE, SIDE), np.float32) if mask is None else mask,
            "has_mask_input": np.array([mask is not None], np.float32),
            "orig_im_size": np.array(size, np.float32),
        },
    )


def _assert_near(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def _wanted(predictor: SamPredictor, **prompts: Any) -> list[np.ndarray]:
    """SamPredictor's answers for one prompt, the single mask before the three."""
    single, several = (
        predictor.predict(**prompts, multimask_output=multimask, return_logits=True)
        for multimask in (False, True)
    )
    return [np.concatenate(pair) for pair in zip(single, several, strict=True)]


@pytest.fixture
def predictor(model: Model) -> SamPredictor:
    predictor = SamPredictor(model.sam)
    predictor.set_image(_image(90, 120))
    return predictor


def test_the_check_that_was_made_is_in_the_result(made: tuple[Path, dict[str, Any]]) -> None:
    check = made[1]["checks"]["decoder.onnx"]
    assert 0 < check["max_relative_difference"] < 1e-4
    assert check["limit"] == LIMIT


def test_inputs_and_outputs_are_those_of_segment_anythings_own_export(
    made: tuple[Path, dict[str, Any]], session: onnxruntime.InferenceSession
) -> None:
    grid = IMAGE_SIZE // 16
    assert {value.name: value.shape for value in session.get_inputs()} == {
        "image_embeddings": [1, 256, grid, grid],
        "point_coords": ["prompts", "points", 2],
        "point_labels": ["prompts", "points"],
        "mask_input": ["mask_inputs", 1, SIDE, SIDE],
        "has_mask_input": [1],
        "orig_im_size": [2],
    }
    assert {value.type for value in session.get_inputs()} == {"tensor(float)"}
    assert {value.name: value.shape for value in session.get_outputs()} == {
        "masks": ["prompts", 4, "height", "width"],
        "iou_predictions": ["prompts", 4],
        "low_res_masks": ["prompts", 4, SIDE, SIDE],
    }
    onnx.checker.check_model(onnx.load(made[1]["out"]), full_check=True)


@pytest.mark.parametrize("size", SIZES)
def test_a_point_gives_the_predictors_masks_at_every_size(
    size: tuple[int, int], model: Model, session: onnxruntime.InferenceSession
) -> None:
    predictor = SamPredictor(model.sam)
    predictor.set_image(_image(*size))
    point = np.array([[size[1] * 0.4, size[0] * 0.7]])
    wanted = _wanted(predictor, point_coords=point, point_labels=np.array([1]))
    padded = np.concatenate([point, [[0, 0]]])[None]
    for found, right in zip(_run(session, predictor, padded, np.array([[1, -1]])), wanted, strict=True):
        _assert_near(found[0], right)


def test_points_of_either_kind_and_a_box_together(
    predictor: SamPredictor, session: onnxruntime.InferenceSession
) -> None:
    points, labels, box = (
        np.array([[30, 20], [70, 60], [5, 80]]),
        np.array([1, 0, 1]),
        np.array([10, 15, 90, 70]),
    )
    wanted = _wanted(predictor, point_coords=points, point_labels=labels, box=box)
    coords = np.concatenate([points, box.reshape(2, 2)])[None]
    for found, right in zip(
        _run(session, predictor, coords, np.array([[1, 0, 1, 2, 3]])), wanted, strict=True
    ):
        _assert_near(found[0], right)


def test_many_boxes_at_once(predictor: SamPredictor, session: onnxruntime.InferenceSession) -> None:
    boxes = np.array([[10, 15, 90, 70], [0, 0, 119, 89], [40, 40, 60, 50], [1, 2, 3, 4], [30, 5, 110, 80]])
    found = _run(session, predictor, boxes.reshape(5, 2, 2), np.tile([[2, 3]], (5, 1)))
    for index, box in enumerate(boxes):
        for mine, right in zip(found, _wanted(predictor, box=box), strict=True):
            _assert_near(mine[index], right)


def test_a_mask_input_is_used_for_all_prompts_or_one_for_each(
    predictor: SamPredictor, session: onnxruntime.InferenceSession
) -> None:
    _, _, low = _wanted(predictor, point_coords=np.array([[30, 20]]), point_labels=np.array([1]))
    boxes = np.array([[10, 15, 90, 70], [0, 0, 119, 89], [40, 40, 60, 50]])
    coords, labels = boxes.reshape(3, 2, 2), np.tile([[2, 3]], (3, 1))
    wanted = [
        [_wanted(predictor, box=box, mask_input=low[None, number]) for box in boxes] for number in range(3)
    ]
    for_all = _run(session, predictor, coords, labels, low[:1, None])
    each = _run(session, predictor, coords, labels, low[:3, None])
    for prompt in range(3):
        for output in range(3):
            _assert_near(for_all[output][prompt], wanted[0][prompt][output])
            _assert_near(each[output][prompt], wanted[prompt][prompt][output])
    without = _run(session, predictor, coords, labels)
    assert np.abs(without[2] - for_all[2]).max() > 1e-3 * np.abs(for_all[2]).max(), "it matters"


def test_the_decoder_takes_a_single_point_without_padding(
    model: Model, predictor: SamPredictor, session: onnxruntime.InferenceSession
) -> None:
    """SamPredictor pads; the prompt encoder's parts don't have to."""
    encoder = model.sam.prompt_encoder
    coords = predictor.transform.apply_coords(np.array([[[30.0, 20.0]]]), predictor.original_size)
    with torch.no_grad():
        sparse = encoder._embed_points(torch.from_numpy(coords).float(), torch.ones(1, 1), pad=False)
        _, dense = encoder(points=None, boxes=None, masks=None)
        low, iou = model.sam.mask_decoder.predict_masks(
            predictor.get_image_embedding(), encoder.get_dense_pe(), sparse, dense
        )
    found = _run(session, predictor, np.array([[[30, 20]]]), np.array([[1]]))
    _assert_near(found[1], iou.numpy())
    _assert_near(found[2], low.numpy())


def test_resampling_along_an_axis_is_interpolates() -> None:
    line = torch.randn(1, 1, 16)
    wanted = F.interpolate(line, size=64, mode="linear", align_corners=False)
    assert torch.allclose(line @ bilinear_matrix(16, 64).T, wanted, atol=1e-6)


def test_the_upscaling_is_sams_postprocessing_in_float64(model: Model) -> None:
    decoder = copy.deepcopy(Decoder(model.sam)).double()
    low = torch.randn(2, 4, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for size in [*SIZES, (63, 65), (127, 129), (1500, 2250), (9, 997)]:
        wanted = model.sam.postprocess_masks(low, resized_size(*size, IMAGE_SIZE), size)
        found = decoder._upscale(low, torch.tensor(size))
        assert found.shape == wanted.shape
        assert float((found - wanted).abs().max()) < 1e-12


def test_resized_sizes_are_rounded_as_sam_rounds_them(model: Model) -> None:
    decoder = Decoder(model.sam)
    for image_size in (64, 1024):
        decoder.image_size = image_size
        rng = np.random.default_rng(0)
        sizes = [(int(a), int(b)) for a, b in rng.integers(image_size // 4, 4 * image_size, (2000, 2))]
        # Sides that come out at a half are where the order of operations shows.
        sizes += [(image_size * 2, odd) for odd in range(1, 400, 2)] + [
            (3 * odd, odd) for odd in range(99, 300)
        ]
        for size in sizes:
            assert tuple(decoder.resized(torch.tensor(size)).tolist()) == resized_size(*size, image_size), (
                size
            )


@pytest.mark.parametrize(
    ("image_size", "longest"),
    [(1024, 2048), (64, 2048), (1008, 2048), (224, 2048)]
    + [pytest.param(size, 8192, marks=pytest.mark.long) for size in (1024, 512, 64, 224, 384, 1008)],
)
def test_integers_round_every_size_as_double_precision_does(image_size: int, longest: int) -> None:
    """By brute force: all sides of all photos up to a size."""
    halves = halves_rounded_down(image_size)
    expected = {(long, side) for long, side in halves.tolist() if long <= longest}
    found = set()
    for long in range(1, longest + 1):
        sides = np.arange(1, long + 1, dtype=np.int64)
        wanted = (sides * (image_size * 1.0 / long) + 0.5).astype(np.int64)  # as ResizeLongestSide
        rounded = (2 * image_size * sides + long) // (2 * long)
        assert np.isin(rounded - wanted, (0, 1)).all()
        found |= {(long, int(side)) for side in sides[rounded != wanted]}
    assert found == expected
    if image_size in (224, 1008):
        assert found


def test_halves_that_are_rounded_down_are_rounded_so_in_the_network(model: Model) -> None:
    decoder = Decoder(model.sam)
    decoder.image_size = 1008
    decoder.halves_L2 = halves_rounded_down(1008)
    for long, side in decoder.halves_L2[::50].tolist():
        for size in ((long, side), (side, long), (long, long)):
            assert tuple(decoder.resized(torch.tensor(size)).tolist()) == resized_size(*size, 1008)


def test_norms_are_one_operator_whose_sums_are_float32(
    session: onnxruntime.InferenceSession, made: Any
) -> None:
    """Squares of differences above 255 don't fit into half precision."""
    nodes = onnx.load(made[1]["out"]).graph.node
    norms = [node for node in nodes if node.op_type == "LayerNormalization"]
    assert len(norms) == 9 + 3, "9 of the transformer, 2 of the mask input, 1 of the upscaling"
    for norm in norms:
        assert {one.name: one.i for one in norm.attribute}["stash_type"] == 1
    assert not {"Pow", "ReduceMean", "Sqrt"} & {node.op_type for node in nodes}


def test_a_norm_of_large_values_survives_half_precision(model: Model) -> None:
    norm = model.sam.mask_decoder.output_upscaling[1]
    x_BCHW = torch.randn(1, norm.weight.numel(), 4, 4, generator=torch.Generator().manual_seed(0)) * 3000
    with torch.no_grad():
        wanted = norm(x_BCHW)
        fused = _with_fused_norms(model.sam.mask_decoder).output_upscaling[1]
        assert torch.allclose(fused(x_BCHW), wanted, atol=1e-5)
        assert torch.allclose(copy.deepcopy(fused).half()(x_BCHW.half()).float(), wanted, atol=0.01)
        assert not torch.isfinite((x_BCHW.half() - x_BCHW.half().mean()).pow(2)).all()
    assert type(model.sam.mask_decoder.output_upscaling[1]) is type(norm), "the model itself keeps its own"


def test_an_upscaling_that_is_wrong_is_refused_whatever_the_weights(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilesam.predict.export import onnx_decoder
    from mobilesam.predict.export.onnx_graph import Session

    monkeypatch.setattr(onnx_decoder, "to_onnx", lambda *_: onnx.load(made[1]["out"]))
    right = Session.run

    def shifted(*args: Any) -> list[torch.Tensor]:
        masks, iou, low = right(*args)
        return [masks.roll(1, dims=-1), iou, low]

    monkeypatch.setattr(Session, "run", shifted)
    with pytest.raises(PredictError, match=r"decoder\.onnx differs from torch"):
        export(ExportConfig(student=made[0], out=tmp_path / "decoder.onnx"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_an_untrained_head_passes_since_torch_itself_rounds_so(run: Path, tmp_path: Path) -> None:
    check = export(ExportConfig(student=run, out=tmp_path / "decoder.onnx"))["checks"]["decoder.onnx"]
    assert check["max_relative_difference"] <= check["limit"]
