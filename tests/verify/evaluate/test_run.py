from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pycocotools import mask as coco
from segment_anything import SamPredictor
from torch import nn

from mobilesam.cli import main
from mobilesam.distill import DistillError, build_student, save_student
from mobilesam.distill.students import cost
from mobilesam.distill.students.registry import outline_student, student_info
from mobilesam.distill.students.student_file import TRAINED_HEAD
from mobilesam.predict.model import load_model, load_teacher_model
from mobilesam.sam import SamError, image_pixels, load_image
from mobilesam.sam.modeling.head import assemble, build_head
from mobilesam.sam.registry import TEACHERS
from mobilesam.sam.teacher import load_head
from mobilesam.store import Audit, EmbeddingStore
from mobilesam.verify import EvaluateConfig, ReportError, VerifyError, evaluate_masks, evaluation_lines
from mobilesam.verify.evaluate.models import outline_encoder
from mobilesam.verify.evaluate.prompts import centre_of_mask, pair_prompts, point_prompts

DISTANCES = (20, 40, 300)


def labelled_masks(size: tuple[int, int], seed: int) -> list[np.ndarray]:
    """Return three ellipses."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    masks = []
    for _ in range(3):
        cy, cx = rng.uniform(0.3, 0.7, 2) * size
        ry, rx = rng.uniform(0.1, 0.3, 2) * size
        masks.append(((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1)
    return masks


def annotation(mask_HW: np.ndarray) -> dict[str, Any]:
    runs = coco.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    box = [float(number) for number in coco.toBbox(runs)]
    return {"segmentation": {"size": list(mask_HW.shape), "counts": runs["counts"].decode()}, "bbox": box}


def label(photo: Path, seed: int) -> None:
    """Write SA-1B's JSON beside a photo."""
    with Image.open(photo) as image:
        width, height = image.size
    content = {
        "image": {"image_id": seed, "width": width, "height": height, "file_name": photo.name},
        "annotations": [annotation(mask_HW) for mask_HW in labelled_masks((height, width), seed)],
    }
    photo.with_suffix(".json").write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def _timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time each model once: medians take most of the time, and the test of them needs no evaluation."""
    monkeypatch.setattr(cost, "FORWARDS", 1)


@pytest.fixture
def labelled(world: Any) -> Any:
    """The world with labels beside each of its photos."""
    for seed, photo in enumerate(sorted(world.photos.glob("*.bmp"))):
        label(photo, seed)
    return world


def ask(predictor: SamPredictor, several: bool, **prompt: Any) -> tuple[np.ndarray, np.ndarray]:
    masks, scores, _ = predictor.predict(**prompt, multimask_output=several)
    return masks, scores


def overlap_of(one_HW: np.ndarray, other_HW: np.ndarray) -> float:
    either = int((one_HW | other_HW).sum())
    return int((one_HW & other_HW).sum()) / either if either else 1.0


class StoredPredictor(SamPredictor):
    """Upstream's predictor with a store's embedding in place of an encoder's."""

    def take(
        self, emb_1CHW: torch.Tensor, original_size: tuple[int, int], input_size: tuple[int, int]
    ) -> None:
        self.reset_image()
        self.features, self.original_size, self.input_size = emb_1CHW, original_size, input_size
        self.is_image_set = True


def by_brute_force(world: Any, student: Any) -> dict[str, Any]:
    """Predict every prompt by itself through upstream's SamPredictor: protocol -> IoUs of each image."""
    encoder = nn.Identity()
    teacher = StoredPredictor(assemble(encoder, build_head(load_head("vit_nano", None), 128)))
    model = SamPredictor(student)
    found: dict[str, list[list[float]]] = {}
    with EmbeddingStore.open(world.store) as store:
        for seed, record in enumerate(store.manifest.records()[:3]):
            image_HWC = np.asarray(Image.open(world.photos / record.key).convert("RGB"))
            size = image_HWC.shape[:2]
            model.set_image(image_HWC)
            teacher.take(
                torch.from_numpy(store.read([record.row]).to_float32()),
                record.original_size,
                record.resized_size,
            )
            sets = {"point": point_prompts(2, size)}
            sets |= {f"pair_{d}": pair_prompts(2, size, d, 5, record.key)[0] for d in DISTANCES}
            for name, prompts in sets.items():
                ious = []
                for points, labels in zip(prompts.points_PN2.numpy(), prompts.labels_PN.numpy(), strict=True):
                    prompt = {"point_coords": points, "point_labels": labels}
                    ious.append(
                        overlap_of(ask(teacher, False, **prompt)[0][0], ask(model, False, **prompt)[0][0])
                    )
                if ious:
                    found.setdefault(name, []).append(ious)
            for mask_HW in labelled_masks(size, seed):
                x, y, width, height = annotation(mask_HW)["bbox"]
                box = ask(model, False, box=np.array([x, y, x + width, y + height]))[0][0]
                centre = {"point_coords": np.array([centre_of_mask(mask_HW)]), "point_labels": np.array([1])}
                three, scores = ask(model, True, **centre)
                of_three = [overlap_of(mask, mask_HW) for mask in three]
                for name, value in (
                    ("box", overlap_of(box, mask_HW)),
                    ("center", overlap_of(ask(model, False, **centre)[0][0], mask_HW)),
                    ("center_picked", of_three[int(np.argmax(scores))]),
                    ("center_oracle", max(of_three)),
                ):
                    found.setdefault(name, []).append([value])
    return found


def test_every_number_is_what_upstreams_predictor_gives_prompt_by_prompt(labelled: Any) -> None:
    config = EvaluateConfig(
        models=(("mine", str(labelled.run.path)),),
        store=labelled.store, points=2, distances=DISTANCES, seed=5, split="all", limit=3,
        device="cpu",
    )  # fmt: skip
    result = evaluate_masks(config)
    wanted = by_brute_force(labelled, load_model(labelled.run.path).sam)
    assert (result["images"], result["evaluated"], result["labelled"], result["failed"]) == (3, 3, 3, [])
    (model,) = result["models"]
    # The decoder's batch moves a few pixels on the edges.
    for name in ("point", "pair_20", "pair_40"):
        means = [np.mean(ious) for ious in wanted[name]]
        assert model["teacher"][name]["miou"] == pytest.approx(np.mean(means), abs=5e-4)
        assert model["teacher"][name]["prompts"] == sum(map(len, wanted[name]))
        assert 0 < model["teacher"][name]["miou"] < 0.95
    for name in ("box", "center", "center_picked", "center_oracle"):
        assert model["labels"][name]["miou"] == pytest.approx(np.mean(wanted[name]), abs=5e-4)
        assert model["labels"][name]["prompts"] == 9
    assert model["labels"]["center_oracle"]["miou"] > model["labels"]["center_picked"]["miou"] > 0
    assert model["teacher"]["pair_300"] is None
    assert "pair_300" not in wanted
    assert result["left_out"]["pair_300"] == 3 * 4
    means = [np.mean(ious) for ious in wanted["point"]]
    assert [one["miou"]["mine"] for one in result["per_image"]] == pytest.approx(means, abs=2e-3)
    json.dumps(result, allow_nan=False)


def test_a_teacher_on_the_fly_is_upstreams_and_agrees_with_itself(labelled: Any) -> None:
    config = EvaluateConfig(
        models=(("self", "vit_nano"), ("mine", str(labelled.run.path))),
        images=labelled.photos, teacher="vit_nano", image_size=128, points=2, distances=(), limit=2,
        device="cpu",
    )  # fmt: skip
    result = evaluate_masks(config)
    same, mine = result["models"]
    assert same["teacher"] == {"point": {"miou": 1.0, "prompts": 8, "images": 2}}
    teacher = SamPredictor(load_teacher_model("vit_nano", image_size=128).sam)
    student = SamPredictor(load_model(labelled.run.path).sam)
    means = []
    for photo in sorted(labelled.photos.glob("*.bmp"))[:2]:
        image_HWC = np.asarray(Image.open(photo).convert("RGB"))
        ious = []
        for points in point_prompts(2, image_HWC.shape[:2]).points_PN2.numpy():
            masks = []
            for predictor in (teacher, student):
                predictor.set_image(image_HWC)
                masks.append(ask(predictor, False, point_coords=points, point_labels=np.array([1]))[0][0])
            ious.append(overlap_of(*masks))
        means.append(np.mean(ious))
    assert mine["teacher"]["point"]["miou"] == pytest.approx(np.mean(means), abs=5e-4)
    assert (result["reference"]["teacher"], result["reference"]["image_size"]) == ("vit_nano", 128)


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


def test_a_store_shows_what_was_held_out_of_every_run(world: Any) -> None:
    models = (("mine", str(world.run.path)),)
    held_out = set(world.run.split.val)
    options = {"store": world.store, "points": 1, "distances": (), "device": "cpu"}
    result = evaluate_masks(EvaluateConfig(models=models, **options))
    assert result["split"] == "val"
    with EmbeddingStore.open(world.store) as store:
        keys = {record.key for record in store.manifest.records() if record.row in held_out}
    assert {one["key"] for one in result["per_image"]} == keys
    assert 0 < len(keys) < 6
    everything = evaluate_masks(EvaluateConfig(models=models, split="all", **options))
    assert (everything["split"], everything["evaluated"]) == ("all", 6)
    alone = evaluate_masks(EvaluateConfig(models=(("nano", "vit_nano"),), **options))
    assert (alone["split"], alone["evaluated"]) == ("all", 6)
    with pytest.raises(VerifyError, match="nothing is held out"):
        evaluate_masks(EvaluateConfig(models=(("nano", "vit_nano"),), split="val", **options))


def test_a_broken_image_or_label_fails_alone_and_by_name(labelled: Any) -> None:
    photos = sorted(labelled.photos.glob("*.bmp"))
    photos[0].with_suffix(".json").write_text("{")
    whole = photos[1].read_bytes()
    photos[1].write_bytes(whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:])
    content = json.loads(photos[2].with_suffix(".json").read_text())
    content["annotations"][1]["bbox"] = [0, 0, float("nan"), 1]
    photos[2].with_suffix(".json").write_text(json.dumps(content))
    photos[3].unlink()
    options = {"points": 1, "distances": (), "device": "cpu", "models": (("nano", "vit_nano"),)}
    result = evaluate_masks(EvaluateConfig(store=labelled.store, images=labelled.photos, **options))
    assert (result["images"], result["evaluated"]) == (6, 2)
    reasons = {one["key"]: one["reason"] for one in result["failed"]}
    assert list(reasons) == [f"photo{i}.bmp" for i in range(4)]
    assert "not JSON" in reasons["photo0.bmp"]
    assert "changed since precompute" in reasons["photo1.bmp"]
    assert "annotation 1: bbox" in reasons["photo2.bmp"]
    assert "missing" in reasons["photo3.bmp"]
    lines = evaluation_lines(result)
    assert "4 images failed:" in lines
    assert sum(line.startswith("  photo") for line in lines) == 4
    photos[1].write_bytes(photos[1].read_bytes()[:500])
    folder = evaluate_masks(EvaluateConfig(images=labelled.photos, image_size=64, **options))
    assert (folder["images"], folder["evaluated"]) == (5, 2)
    assert [one["key"] for one in folder["failed"]] == ["photo0.bmp", "photo1.bmp", "photo2.bmp"]


def test_labels_of_coco_of_a_folder_and_of_a_tar_give_the_same_numbers(world: Any, tmp_path: Path) -> None:
    images, objects = [], []
    for seed, photo in enumerate(sorted(world.photos.glob("*.bmp"))[:2]):
        with Image.open(photo) as image:
            width, height = image.size
        images.append({"id": seed, "file_name": photo.name, "width": width, "height": height})
        for mask_HW in labelled_masks((height, width), seed):
            objects.append({"id": len(objects), "image_id": seed, "iscrowd": 0, **annotation(mask_HW)})
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": objects}))
    options = {"points": 0, "image_size": 128, "device": "cpu", "models": (("nano", "vit_nano"),)}
    result = evaluate_masks(EvaluateConfig(images=world.photos, coco=path, **options))
    assert (result["images"], result["evaluated"], result["labelled"]) == (6, 2, 2)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for seed, photo in enumerate(sorted(world.photos.glob("*.bmp"))[:2]):
            label(photo, seed)
            tar.add(photo, photo.name)
            tar.add(photo.with_suffix(".json"), f"{photo.stem}.json")
    beside = evaluate_masks(EvaluateConfig(images=world.photos, **options))
    assert beside["models"][0]["labels"] == result["models"][0]["labels"]
    in_tar = evaluate_masks(EvaluateConfig(images=tmp_path / "set.tar", **options))
    assert in_tar["models"][0]["labels"] == result["models"][0]["labels"]
    fewer = evaluate_masks(EvaluateConfig(images=world.photos, max_objects=1, **options))
    assert fewer["models"][0]["labels"]["box"]["prompts"] == 2


def test_an_embedding_that_is_not_finite_leaves_the_mean_undefined(labelled: Any, tmp_path: Path) -> None:
    student = build_student("tiny_vit", 128, seed=0)
    with torch.no_grad():
        next(iter(student.neck.parameters())).fill_(3e38)
    save_student(student, tmp_path / "student.safetensors", "tiny_vit", 128, {})
    config = EvaluateConfig(
        models=(("huge", str(tmp_path / "student.safetensors")),), store=labelled.store, images=labelled.photos,
        points=1, distances=(), limit=1, device="cpu",
    )  # fmt: skip
    result = evaluate_masks(config)
    (model,) = result["models"]
    assert model["teacher"]["point"]["miou"] is None
    assert model["labels"]["box"]["miou"] is None
    assert "undefined" in "\n".join(evaluation_lines(result))
    json.dumps(result, allow_nan=False)


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
    with pytest.raises(VerifyError, match=r"--model b: .* lies without a mask decoder: .* --store"):
        evaluate_masks(EvaluateConfig(models=(("b", str(lone)),), images=world.photos, **options))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--model x: there is no .*/x.pt; give a run, an export"),
        (b"not a model", "no safetensors file|is not a student|damaged"),
        (b"", "damaged|no safetensors|is empty"),
        ("flat", r"--model x: .* holds none of vit_h, vit_l, vit_b and mobile_sam; .* x=fastsam:.*x.pt"),
    ],
)
def test_a_file_that_is_no_model_is_refused_by_name(
    world: Any, tmp_path: Path, content: bytes | str | None, message: str
) -> None:
    path = tmp_path / "x.pt"
    if content == "flat":
        torch.save({"image_encoder.x": torch.zeros(2)}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises((VerifyError, DistillError, SamError), match=message):
        evaluate_masks(EvaluateConfig(models=(("x", str(path)),), images=world.photos, device="cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ()}, "at least one --model NAME=FILE"),
        ({"models": (("a", ""),)}, "--model a=: give NAME=FILE"),
        ({"models": (("a", "x"), ("a", "y"))}, "2 models are named a"),
        ({"store": None}, "give --store STORE or --images DIR"),
        ({"teacher": "vit_h"}, "--teacher has nothing to do"),
        ({"store": None, "images": "p", "teacher": "vit_x"}, "there is no 'vit_x'"),
        ({"checkpoint": "x.pt"}, "--checkpoint is a teacher's"),
        ({"store": None, "images": "p", "split": "val"}, "--split val is of a store's rows"),
        ({"split": "train"}, "--split 'train'"),
        ({"points": 65}, "--points 65"),
        ({"distances": (100, 0)}, "--distances"),
        ({"distances": (100, 100)}, "one comes twice"),
        ({"max_objects": 0}, "--max-objects 0"),
        ({"limit": 0}, "--limit 0"),
        ({"seed": -1}, "--seed -1"),
        ({"image_size": 100}, "--image-size 100"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_any_work(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(VerifyError, match=message):
        EvaluateConfig(**({"models": (("a", "x"),), "store": "s"} | options))


def test_kept_images_are_enough_for_sams_and_not_for_others(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from one_process import one_process_cluster, precompute_small

    with one_process_cluster() as cluster:
        precompute_small(
            images=(world.photos,), out=tmp_path / "kept.zarr", keep_images=True, dtype="float32",
            precision="float32", scheduler=cluster.scheduler_address,
        )  # fmt: skip
    options = {"store": tmp_path / "kept.zarr", "points": 1, "distances": (20,), "limit": 2, "device": "cpu"}
    whole = evaluate_masks(EvaluateConfig(models=(("a", "vit_nano"),), images=world.photos, **options))
    kept = evaluate_masks(
        EvaluateConfig(models=(("a", "vit_nano"),), report=tmp_path / "report.html", **options)
    )
    assert kept["models"][0]["teacher"] == whole["models"][0]["teacher"]
    assert kept["models"][0]["teacher"]["point"]["miou"] == pytest.approx(1, abs=1e-3)
    assert (tmp_path / "report.html").stat().st_size > 10_000


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


# ---- the command line


@pytest.fixture
def run(world: Any) -> Callable[..., Any]:
    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])

    return invoke


def test_the_command_prints_a_table_or_one_object(labelled: Any, run: Callable[..., Any]) -> None:
    arguments = ("--store", "store.zarr", "--model", "mine=runs/latest", "--model", "nano=vit_nano", "--points", 1,
                 "--distances", "20,300", "--limit", 1)  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "1 of 1 image, split val"
    titles = [
        "Cost on this machine",
        "mIoU with vit_nano's masks, 1 x 1 points in 1 image",
        "mIoU with labels, 3 objects",
    ]
    for title in titles:
        at = next(i for i, line in enumerate(lines) if line.startswith(title))
        assert [line.split()[0] for line in lines[at + 1 : at + 4]] == ["model", "mine", "nano"]
    assert "1 of 2 pairs don't fit" in result.stdout
    as_json = json.loads(run(*arguments, "--json").stdout)
    assert [model["name"] for model in as_json["models"]] == ["mine", "nano"]


def test_nothing_to_compare_exits_3_and_says_what_to_give(run: Callable[..., Any]) -> None:
    result = run("--images", "photos-0", "--model", "nano=vit_nano", "--image-size", 64)
    assert result.exit_code == 3
    assert "give --store, --teacher, or labels" in result.stdout
    for photo in Path("photos-0").iterdir():
        photo.with_suffix(".json").write_text("[]")
    result = run("--images", "photos-0", "--model", "nano=vit_nano", "--image-size", 64, "--json")
    assert result.exit_code == 3
    assert len(json.loads(result.stdout)["failed"]) == 6


def test_wrong_use_exits_2(run: Callable[..., Any]) -> None:
    for arguments, message in (
        (("--store", "store.zarr"), "--model NAME=FILE"),
        (("--store", "store.zarr", "--model", "runs/latest"), "give NAME=FILE"),
        (("--store", "s", "--model", "a=b", "--distances", "1,x"), "--distances '1,x'"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr


def test_the_report_shows_everybodys_masks_and_needs_nothing_else(
    labelled: Any, run: Callable[..., Any], tmp_path: Path
) -> None:
    for photo in labelled.photos.glob("*.bmp"):
        if photo.name == "photo2.bmp":
            photo.with_suffix(".json").write_text("{")
    save_student(
        build_student("deit_tiny", 64, seed=0),
        tmp_path / "s.safetensors",
        "deit_tiny",
        64,
        {"teacher": "<b>&"},
    )
    result = run(
        "--store", "store.zarr", "--model", "mine=runs/latest", "--model", f"<i>deit={tmp_path / 's.safetensors'}",
        "--split", "all", "--limit", 4, "--points", 1, "--distances", "none", "--report", "report.html", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    page = Path("report.html").read_text()
    assert "<i>deit" not in page
    assert "&lt;i&gt;deit" in page
    assert "photo2.bmp" in page
    # Three images have two strips each: the teacher's or the labels, and each model's; and a photo.
    assert page.count('<img src="data:image/jpeg;base64,') == 3 * (1 + 2 * 3)
    assert "http" not in page.replace("http-equiv", "")
    figures = json.loads(result.stdout)["models"][0]["teacher"]["point"]["miou"]
    assert f"{figures:.4f}" in page


def test_a_report_that_cannot_be_written_is_refused_before_any_work(world: Any) -> None:
    config = EvaluateConfig(
        models=(("a", "nowhere"),), store=world.store, report=world.path / "gone" / "report.html"
    )
    with pytest.raises(VerifyError, match=r"its folder .* does not exist"):
        evaluate_masks(config)


def test_what_was_found_outlives_photos_that_go_away_before_the_report(world: Any) -> None:
    options = {"models": (("a", "vit_nano"),), "images": world.photos, "teacher": "vit_nano", "points": 1}

    def last(done: int, total: int) -> None:
        if done == total:
            shutil.rmtree(world.photos)

    whole = evaluate_masks(EvaluateConfig(**options))
    with pytest.raises(ReportError, match=r"no report: photo\d\.bmp: the file is missing") as caught:
        evaluate_masks(EvaluateConfig(**options, report=world.path / "report.html"), progress=last)
    kept = caught.value.result
    assert kept["report"] is None
    assert kept["models"][0]["teacher"] == whole["models"][0]["teacher"]
    assert kept["per_image"] == whole["per_image"]
    assert not (world.path / "report.html").exists()
    assert not any("report" in line for line in evaluation_lines(kept))


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


def test_a_coco_file_that_names_none_of_the_images_is_noted(world: Any, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    entry = {"id": 1, "file_name": "elsewhere/9.jpg", "width": 4, "height": 4}
    path.write_text(json.dumps({"images": [entry], "annotations": []}))
    options = {"images": world.photos, "coco": path, "image_size": 128, "device": "cpu", "points": 1}
    result = evaluate_masks(
        EvaluateConfig(models=(("nano", "vit_nano"),), teacher="vit_nano", distances=(), **options)
    )
    (note,) = result["notes"]
    assert note.startswith("instances.json names none of the 6 images: it has 'elsewhere/9.jpg' for instance")
    assert result["evaluated"] == 6


def test_a_student_without_its_run_may_have_learned_from_what_judges_it(world: Any, tmp_path: Path) -> None:
    options = {"store": world.store, "points": 1, "distances": (), "device": "cpu", "limit": 1}
    shutil.copy(world.run.student_path, tmp_path / "copy.safetensors")
    models = (("mine", str(world.run.path)), ("copy", str(tmp_path / "copy.safetensors")))
    alone = evaluate_masks(EvaluateConfig(models=models[1:], **options))
    assert any(note.startswith("copy was trained on this store") for note in alone["notes"])
    # Beside its run, what was held out of that is held out of the copy.
    both = evaluate_masks(EvaluateConfig(models=models, **options))
    assert not any("was trained on this store" in note for note in both["notes"])


def test_a_store_that_fails_its_audit_is_noted(world: Any) -> None:
    with EmbeddingStore.open(world.store, writable=True) as store:
        store.record_audits([Audit(row=1, cosine=0.4, relative_mse=1.2)])
    options = {"store": world.store, "points": 1, "distances": (), "device": "cpu", "limit": 1}
    result = evaluate_masks(EvaluateConfig(models=(("nano", "vit_nano"),), **options))
    assert any(note.startswith("the store's audit: cosine 0.4") for note in result["notes"])
