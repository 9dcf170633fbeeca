from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_photos import annotation, label, labelled_masks
from PIL import Image
from segment_anything import SamPredictor
from torch import nn

from mobilesam.distill import build_student, save_student
from mobilesam.predict.model import load_model, load_teacher_model
from mobilesam.sam.modeling.head import assemble, build_head
from mobilesam.sam.teacher import load_head
from mobilesam.store import Audit, EmbeddingStore
from mobilesam.verify import EvaluateConfig, VerifyError, evaluate_masks, evaluation_lines
from mobilesam.verify.evaluate.prompts import centre_of_mask, pair_prompts, point_prompts

DISTANCES = (20, 40, 300)


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
    assert (result["images"], result["evaluated"]) == (6, 3)
    reasons = {one["key"]: one["reason"] for one in result["failed"]}
    assert list(reasons) == ["photo0.bmp", "photo1.bmp", "photo3.bmp"]
    assert "not JSON" in reasons["photo0.bmp"]
    assert "changed since precompute" in reasons["photo1.bmp"]
    assert "missing" in reasons["photo3.bmp"]
    # A broken object costs itself alone.
    assert result["labels"]["left_out"] == {"bbox not in the image": 1}
    assert result["labels"]["objects"] == 8
    lines = evaluation_lines(result)
    assert "3 images failed:" in lines
    assert sum(line.startswith("  photo") for line in lines) == 3
    assert "note: 1 of 9 labelled objects left out (bbox not in the image: 1)" in lines
    assert any(
        line.startswith("note: left out: photo2.bmp: annotation 1: bbox [0, 0, nan, 1]") for line in lines
    )
    photos[1].write_bytes(photos[1].read_bytes()[:500])
    folder = evaluate_masks(EvaluateConfig(images=labelled.photos, image_size=64, **options))
    assert (folder["images"], folder["evaluated"]) == (5, 3)
    assert [one["key"] for one in folder["failed"]] == ["photo0.bmp", "photo1.bmp"]


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


def test_a_coco_file_that_names_none_of_the_images_is_noted(world: Any, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    entry = {"id": 1, "file_name": "elsewhere/9.jpg", "width": 4, "height": 4}
    path.write_text(json.dumps({"images": [entry], "annotations": []}))
    options = {"images": world.photos, "coco": path, "image_size": 128, "device": "cpu", "points": 1}
    result = evaluate_masks(
        EvaluateConfig(models=(("nano", "vit_nano"),), teacher="vit_nano", distances=(), **options)
    )
    (note,) = result["notes"]
    assert note == (
        "instances.json: 0 of 1 listed images are among yours; not among them: elsewhere/9.jpg; yours have names "
        "such as photo0.bmp"
    )
    assert result["evaluated"] == 6


def test_a_student_of_this_store_without_its_run_is_noted(world: Any, tmp_path: Path) -> None:
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
