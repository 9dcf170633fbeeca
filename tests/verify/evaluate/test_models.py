from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamPredictor

from mobilesam.distill import DistillError, build_student, save_student
from mobilesam.distill.students import cost
from mobilesam.distill.students.registry import outline_student, student_info
from mobilesam.distill.students.student_file import TRAINED_HEAD
from mobilesam.predict.model import load_teacher_model
from mobilesam.sam import SamError, image_pixels, load_image
from mobilesam.sam.registry import TEACHERS
from mobilesam.sam.teacher import load_head
from mobilesam.verify import EvaluateConfig, VerifyError, evaluate_masks
from mobilesam.verify.evaluate.models import outline_encoder


@pytest.mark.parametrize(
    ("kind", "parameters", "macs"),
    [("vit_b", 89_670_912, 0.49e12), ("vit_h", 637_026_048, 2.98e12), ("mobile_sam", 5_743_892, 38.8e9)],
)
def test_published_encoders_have_their_published_costs(kind: str, parameters: int, macs: float) -> None:
    outline = outline_encoder(kind, 1024)
    assert sum(parameter.numel() for parameter in outline.parameters()) == parameters
    assert cost.count_macs(outline, 1024) == pytest.approx(macs, rel=0.01)


def test_a_median_is_of_the_calls_after_the_first_within_a_limit() -> None:
    calls: list[int] = []
    assert cost.median_seconds(lambda: calls.append(0), torch.device("cpu")) >= 0
    assert len(calls) == 1 + cost.FORWARDS
    calls.clear()
    cost.median_seconds(lambda: calls.append(0), torch.device("cpu"), limit=0.0)
    assert len(calls) == 2


def test_models_are_known_by_their_content(world: Any, tmp_path: Path) -> None:
    encoder = build_student("tiny_vit", 64, seed=1).state_dict()
    mobile_sam = {f"image_encoder.{key}": value for key, value in encoder.items()} | load_head(
        "vit_nano", None
    )
    torch.save(mobile_sam, tmp_path / "some.bin")
    lone = tmp_path / "student.safetensors"
    save_student(build_student("deit_tiny", 64, seed=0), lone, "deit_tiny", 64, {})
    options = {"points": 1, "distances": (), "limit": 1, "device": "cpu"}
    own = tmp_path / "own" / "student.safetensors"
    own.parent.mkdir()
    head = {key: value * 1.01 for key, value in load_head("vit_nano", None).items()}
    save_student(build_student("tiny_vit", 64, seed=0), own, "tiny_vit", 64, {TRAINED_HEAD: True}, head=head)
    models = (
        ("a", str(tmp_path / "some.bin")),
        ("b", str(lone)),
        ("c", str(world.run.student_path)),
        ("d", str(own.parent)),
    )
    found = evaluate_masks(EvaluateConfig(models=models, store=world.store, **options))["models"]
    assert [(one["kind"], one["image_size"]) for one in found] == [
        ("tiny_vit", 128), ("deit_tiny", 64), ("tiny_vit", 128), ("tiny_vit", 64),
    ]  # fmt: skip
    assert [one["head"] for one in found] == [
        str(tmp_path / "some.bin"), str(world.store), str(world.run.head_path), str(own),
    ]  # fmt: skip
    assert found[2]["run"] == world.run.path.name
    with pytest.raises(VerifyError, match=r"--model b: there is no mask decoder for .*: .* --store"):
        evaluate_masks(EvaluateConfig(models=(("b", str(lone)),), images=world.photos, **options))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--model x: .*/x.pt does not exist; give a run, an export"),
        (b"not a model", "x.pt .* is not a checkpoint of PyTorch or safetensors: it is a text"),
        (b"", "damaged|no safetensors|is empty"),
        ("flat", r"--model x: .* and mobile_sam: it holds 1 tensor, image_encoder.x$"),
        ("yolo", r"(?s)--model x: .* the names are YOLO's or FastSAM's\n.* write x=fastsam:.*x.pt$"),
    ],
)
def test_a_file_that_is_no_model_is_refused_by_name(
    world: Any, tmp_path: Path, content: bytes | str | None, message: str
) -> None:
    path = tmp_path / "x.pt"
    if content == "flat":
        torch.save({"image_encoder.x": torch.zeros(2)}, path)
    elif content == "yolo":
        torch.save({"model.0.conv.weight": torch.zeros(2)}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises((VerifyError, DistillError, SamError), match=message):
        evaluate_masks(EvaluateConfig(models=(("x", str(path)),), images=world.photos, device="cpu"))


@pytest.mark.long
def test_a_sam_checkpoint_is_a_teacher_by_its_content(world: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = TEACHERS["vit_b"].encoder.build(1024).state_dict()
    torch.save(
        {f"image_encoder.{k}": v for k, v in encoder.items()} | load_head("vit_nano", None),
        tmp_path / "b.pth",
    )
    config = EvaluateConfig(
        models=(("b", str(tmp_path / "b.pth")),), images=world.photos, teacher="vit_b",
        checkpoint=tmp_path / "b.pth", image_size=128, points=1, distances=(), limit=1, device="cpu",
    )  # fmt: skip
    (model,) = evaluate_masks(config)["models"]
    assert (model["kind"], model["image_size"], model["head"]) == ("vit_b", 128, "vit_b's own")
    assert model["teacher"]["point"]["miou"] == 1


def test_costs_are_those_of_the_networks(labelled: Any) -> None:
    config = EvaluateConfig(
        models=(("mine", str(labelled.run.path)), ("nano", "vit_nano")), store=labelled.store, points=1, distances=(),
        limit=1, device="cpu",
    )  # fmt: skip
    mine, nano = evaluate_masks(config)["models"]
    head = sum(value.numel() for key, value in load_head("vit_nano", None).items() if "gaussian" not in key)
    encoder = load_teacher_model("vit_nano", image_size=128).sam.image_encoder
    small = sum(parameter.numel() for parameter in encoder.parameters())
    assert (mine["encoder_parameters"], nano["encoder_parameters"]) == (5_743_892, small)
    assert (mine["parameters"], nano["parameters"]) == (5_743_892 + head, small + head)
    for model in (mine, nano):
        assert model["encoder_ms"] > 0
        assert model["decoder_ms"] > 0
    assert mine["encoder_macs"] == cost.count_macs(outline_student(student_info("tiny_vit"), 128), 128)
    assert 0 < nano["encoder_macs"] < mine["encoder_macs"]


def test_pixels_of_an_image_are_upstreams_for_every_encoder(world: Any) -> None:
    """Encoders are given the pixels that SamPredictor gives its encoder."""
    photo = world.photos / "photo0.bmp"
    image = load_image(photo.read_bytes(), 128)
    ours = image_pixels(image, 128)
    sam = load_teacher_model("vit_nano", image_size=128).sam
    seen: list[torch.Tensor] = []
    sam.image_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    SamPredictor(sam).set_image(np.asarray(Image.open(photo).convert("RGB")))
    assert torch.equal(ours, seen[0])
