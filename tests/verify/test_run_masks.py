from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flips import flipped
from one_process import one_process_cluster, precompute_small
from PIL import Image

from mobilesam.distill import load_student
from mobilesam.distill.metrics.masks import MaskComparison
from mobilesam.sam import load_image, normalize_and_pad, place_on_canvas
from mobilesam.sam.modeling.head import build_head
from mobilesam.sam.modeling.masks import point_masks
from mobilesam.sam.teacher import load_head
from mobilesam.store import EmbeddingStore, StoreDamaged, encode_head
from mobilesam.verify import VerifyConfig, VerifyError, table_lines, verify


def test_the_mean_agrees_with_a_computation_by_hand(world):
    result = verify(VerifyConfig(split="all", points=3))
    student, _ = load_student(world.run.path)
    head = build_head(load_head("vit_nano", None), 128)
    means = []
    with EmbeddingStore.open(world.store) as store:
        for record in store.manifest.records():
            teacher_1CHW = torch.from_numpy(store.read([record.row]).to_float32())
            image = load_image((world.photos / record.key).read_bytes(), 128)
            canvas_HWC = np.zeros((128, 128, 3), np.uint8)
            place_on_canvas(image, canvas_HWC)
            with torch.no_grad():
                student_1CHW = student(
                    normalize_and_pad(torch.from_numpy(canvas_HWC)[None], torch.tensor([record.resized_size]))
                )
            height, width = Image.open(world.photos / record.key).size[::-1]
            ious = []
            for point in [
                ((i + 0.5) / 3 * width, (j + 0.5) / 3 * height) for j in range(3) for i in range(3)
            ]:
                one, other = (
                    point_masks(head, emb, np.array([point]), (height, width), record.resized_size)[0].numpy()
                    for emb in (student_1CHW, teacher_1CHW)
                )
                union = (one | other).sum()
                ious.append((one & other).sum() / union if union else 1.0)
            means.append(np.mean(ious))
    assert len(means) == result["images"] == 6
    # The decoder's batch and the student's layout move a few pixels on the edges.
    assert result["miou"] == pytest.approx(np.mean(means), abs=2e-3)
    assert result["miou_min"] == pytest.approx(min(means), abs=2e-3)
    assert 0 < result["miou"] < 0.9
    assert result["prompts"] == 9


def test_a_masks_threshold_fails_with_both_numbers_in_result_table_and_report(world):
    report = world.path / "report.html"
    result = verify(VerifyConfig(split="all", min_miou=0.99, min_cosine=-1.0, report=report))
    assert result["failed_checks"] == [
        {"check": "min_miou", "metric": "miou", "value": result["miou"], "threshold": 0.99}
    ]
    lines = table_lines(result)
    assert any(line.startswith("FAILED  miou") for line in lines)
    assert any(line.split() == ["mIoU", f"{result['miou']:.4f}"] for line in lines)
    assert any(line.startswith("masks: 4 x 4 points an image") for line in lines)
    page = report.read_text()
    for stated in (
        "1 of 2 thresholds missed",
        "Masks, 4 x 4 points",
        f"{result['miou_min']:.4f}",
    ):
        assert stated in page
    assert verify(VerifyConfig(split="all", min_miou=0.0))["passed"]


def test_without_points_masks_are_nowhere_and_the_rest_is_the_same(world):
    report = world.path / "report.html"
    bare = verify(VerifyConfig(points=0, report=report))
    assert not {"miou", "miou_min", "miou_constant", "prompts", "empty_masks"} & set(bare)
    assert not any(line.startswith(("masks", "mIoU")) for line in table_lines(bare))
    assert "s masks for" not in report.read_text()
    full = verify(VerifyConfig(report=report))
    # Without masks photos are ranked by their embeddings, and the answer is in terms of skill.
    assert {key: full[key] for key in bare if key not in ("summary", "examples")} == {
        key: value for key, value in bare.items() if key not in ("summary", "examples")
    }
    assert "follows" not in bare
    assert "follows the teacher" not in bare["summary"]


OTHER_HEAD, _ = encode_head({"prompt_encoder.weight": np.arange(3, dtype=np.float32)})


@pytest.mark.parametrize("head", [OTHER_HEAD, b"not safetensors"], ids=["another network", "rubbish"])
def test_a_head_that_is_none_is_refused_with_the_way_on(other_store, head):
    store = other_store(head=head)
    with pytest.raises(VerifyError, match="not a SAM head") as refused:
        verify(VerifyConfig(store=store, split="all"))
    assert str(refused.value).endswith("so masks can't be compared: --points 0 leaves them out")
    assert verify(VerifyConfig(store=store, split="all", points=0))["images"] == 6


def test_a_head_with_a_value_that_is_not_finite_is_refused(other_store):
    state = {key: value.numpy() for key, value in load_head("vit_nano", None).items()}
    state["mask_decoder.iou_token.weight"][0, 3] = np.nan
    store = other_store(head=encode_head(state)[0])
    with pytest.raises(VerifyError, match=r"aren't finite, in mask_decoder\.iou_token\.weight"):
        verify(VerifyConfig(store=store, split="all"))


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_damaged_head_is_named_with_its_mend(world, damage):
    with EmbeddingStore.open(world.store) as store:
        path = store.head_path
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(flipped(path.read_bytes(), 8 * 1000))
    with pytest.raises(StoreDamaged, match="run the same mobilesam precompute again"):
        verify(VerifyConfig())


def test_an_embedding_that_is_not_finite_leaves_the_mean_undefined(world):
    head = build_head(load_head("vit_nano", None), 128)
    with EmbeddingStore.open(world.store) as store:
        comparison = MaskComparison(head, {record.row: record for record in store.manifest.records()}, 2)
        emb_BCHW = torch.from_numpy(store.read([0, 1]).to_float32())
    broken_BCHW = emb_BCHW.clone()
    broken_BCHW[1, 0, 0, 0] = np.nan
    comparison.update([0, 1], broken_BCHW, emb_BCHW)
    result = comparison.result()
    assert comparison.per_image[0] == 1.0
    assert (result["miou"], result["miou_min"]) == (None, None)
    json.dumps(result, allow_nan=False)


def test_a_constants_masks_are_compared_beside_the_students(world):
    head = build_head(load_head("vit_nano", None), 128)
    with EmbeddingStore.open(world.store) as store:
        records = {record.row: record for record in store.manifest.records()}
        emb_BCHW = torch.from_numpy(store.read([0, 1]).to_float32())
    constant_CHW = emb_BCHW.mean(dim=0)
    both = MaskComparison(head, records, 2, constant_CHW=constant_CHW)
    both.update([0, 1], emb_BCHW, emb_BCHW)
    alone = MaskComparison(head, records, 2)
    alone.update([0, 1], constant_CHW.expand_as(emb_BCHW), emb_BCHW)
    assert both.result() == {
        **both.result(),
        "miou": 1.0,
        "miou_constant": pytest.approx(alone.result()["miou"]),
    }
    assert alone.result()["miou"] < 1
    assert "miou_constant" not in alone.result()


def test_empty_masks_are_counted_for_each_side(world):
    head = build_head({key: value.clone() for key, value in load_head("vit_nano", None).items()}, 128)
    with EmbeddingStore.open(world.store) as store:
        comparison = MaskComparison(head, {record.row: record for record in store.manifest.records()}, 2)
        emb_BCHW = torch.from_numpy(store.read([0]).to_float32())
    comparison.update([0], emb_BCHW, emb_BCHW)
    assert comparison.result()["empty_masks"] == {"teacher": 0, "student": 0}
    # No hypernetwork, no logits: 0 everywhere is not above 0.
    for layer in head.mask_decoder.output_hypernetworks_mlps[0].layers:
        layer.weight.zero_()
        layer.bias.zero_()
    comparison.update([0], emb_BCHW, -emb_BCHW)
    assert comparison.result()["empty_masks"] == {"teacher": 4, "student": 4}
    assert comparison.per_image[1] == 1.0


@pytest.fixture(scope="module")
def mobile_sam_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in mobile_sam.pt's format, written by upstream's classes, and a float32 store made from it."""
    upstream = pytest.importorskip("mobile_sam")
    folder = tmp_path_factory.mktemp("mobile_sam")
    photos = folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(90, 128), (160, 100), (64, 64)]):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(photos / f"{i}.png")
    torch.manual_seed(0)
    state = upstream.sam_model_registry["vit_t"]().state_dict()
    for key, value in state.items():
        if key.startswith("image_encoder.") and value.dim() > 1 and "attention_biases" not in key:
            value.normal_(0, value[0].numel() ** -0.5)
    torch.save(state, folder / "mobile_sam.pt")
    with one_process_cluster() as cluster:
        precompute_small(
            images=(photos,), out=folder / "store.zarr", teacher="mobile_sam", checkpoint=folder / "mobile_sam.pt",
            image_size=128, dtype="float32", precision="float32", scheduler=cluster.scheduler_address,
        )  # fmt: skip
    return folder / "store.zarr", folder / "mobile_sam.pt"


def test_the_teachers_own_file_as_student_is_the_teacher(mobile_sam_store):
    store, file = mobile_sam_store
    result = verify(
        VerifyConfig(
            store=store, student=file, split="all", precision="float32",
            min_cosine=0.999999, min_skill=0.999999, min_miou=0.999999,
        )
    )  # fmt: skip
    assert result["passed"], result["failed_checks"]
    assert result["cosine"]["min"] == pytest.approx(1, abs=1e-6)
    assert result["skill"] == pytest.approx(1, abs=1e-6)
    assert (result["miou"], result["miou_min"]) == (pytest.approx(1, abs=1e-6), pytest.approx(1, abs=1e-6))
    assert result["empty_masks"] == {"teacher": 0, "student": 0}


def test_the_same_file_with_its_weights_shuffled_fails_every_threshold(mobile_sam_store, tmp_path):
    store, file = mobile_sam_store
    state = torch.load(file, weights_only=True)
    for key, value in state.items():
        if key.startswith("image_encoder.") and value.dim() > 1:
            state[key] = value.flatten()[torch.randperm(value.numel())].reshape(value.shape)
    torch.save(state, tmp_path / "shuffled.pt")
    result = verify(
        VerifyConfig(
            store=store,
            student=tmp_path / "shuffled.pt",
            split="all",
            min_cosine=0.9,
            min_skill=0.5,
            min_miou=0.9,
        )
    )
    assert [check["check"] for check in result["failed_checks"]] == ["min_cosine", "min_skill", "min_miou"]
