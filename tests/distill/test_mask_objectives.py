"""What each objective trains, and by which masks."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from safetensors.torch import load_file
from torch import Tensor

from mobilesam.distill import DistillConfig, DistillError, DistillInterrupted, Run, StopFlag, distill
from mobilesam.distill.data.loader import AnnotatedObjects
from mobilesam.distill.loss.base import Part, WholeBatch, part_generator
from mobilesam.distill.loss.masks import MaskLossWeights, MaskTraining, Objects
from mobilesam.distill.loss.objectives import (
    MaskOptions,
    SemiCoupled,
    batch_objects,
    inside_square,
    teacher_masks,
)
from mobilesam.distill.loss.prompts import to_square, uniform_pixel
from mobilesam.distill.run import summary_lines
from mobilesam.distill.students.student_file import trained_head
from mobilesam.distill.trainer import fill_gradients
from mobilesam.predict import ExportConfig, export
from mobilesam.sam import valid_cells
from mobilesam.sam.modeling.head import SamHead, build_head
from mobilesam.sam.modeling.head_shapes import HEAD_PREFIXES
from mobilesam.sam.teacher import load_head

Options = Callable[..., DistillConfig]


@pytest.fixture(scope="module")
def head_tensors() -> dict[str, Tensor]:
    return load_head("vit_nano", None)


@pytest.fixture(scope="module")
def head(head_tensors: dict[str, Tensor]) -> SamHead:
    return build_head({key: value.clone() for key, value in head_tensors.items()}, 64)


@pytest.fixture(scope="module")
def masked_store(images: Path, make_store: Callable[..., Path], head_tensors: dict[str, Tensor]) -> Path:
    """The six pictures with random embeddings, and a head that works."""
    return make_store(images, head={key: value.numpy() for key, value in head_tensors.items()})


@pytest.fixture
def labelled_store(
    images: Path, tmp_path: Path, make_store: Callable[..., Path], head_tensors: dict[str, Tensor]
) -> Path:
    """The same with two objects in the annotations of each picture."""
    folder = tmp_path / "labelled"
    shutil.copytree(images, folder)
    store = make_store(folder, head={key: value.numpy() for key, value in head_tensors.items()})
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        width, height = Image.open(path).size
        annotate(path, [(0, 0, width // 2, height), (width // 2, height // 4, width, height)], number)
    return store


def annotate(path: Path, boxes: list[tuple[int, int, int, int]], number: int = 0) -> None:
    """Writes SA-1B's JSON beside a picture, its objects filled boxes."""
    width, height = Image.open(path).size
    objects = []
    for x0, y0, x1, y1 in boxes:
        mask = np.zeros((height, width), np.uint8)
        mask[y0:y1, x0:x1] = 1
        rle = coco.encode(np.asfortranarray(mask))
        segmentation = {"size": [height, width], "counts": rle["counts"].decode()}
        objects.append(
            {
                "id": len(objects),
                "segmentation": segmentation,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(mask.sum()),
            }
        )
    about = {"image_id": number, "width": width, "height": height, "file_name": path.name}
    path.with_suffix(".json").write_text(json.dumps({"image": about, "annotations": objects}))


def weights(run: Path, prefixes: str | tuple[str, ...]) -> dict[str, Tensor]:
    return {k: v for k, v in load_file(run / "student.safetensors").items() if k.startswith(prefixes)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def run_of(result: dict[str, Any]) -> Path:
    return Path(result["run"])


def test_the_teachers_masks_are_those_of_upstreams_decoder():
    # As torch draws it: vit_nano's head makes a tenth of a logit of how a processor rounds several images at once.
    torch.manual_seed(0)
    head = SamHead(64).eval()
    emb_PCHW = torch.randn(4, 256, 4, 4, generator=torch.Generator().manual_seed(0))
    inside = inside_square(torch.tensor([[64, 64], [64, 40], [20, 64], [64, 64]]), 64, 32)
    found = teacher_masks(head, emb_PCHW, inside, torch.Generator().manual_seed(5))
    points = to_square(uniform_pixel(inside, torch.Generator().manual_seed(5)), 64, 32)
    for p in range(4):
        with torch.no_grad():
            sparse, dense = head.prompt_encoder(
                points=(points[p][None, None], torch.ones(1, 1)), boxes=None, masks=None
            )
            logits, iou = head.mask_decoder(
                emb_PCHW[p][None], head.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=True
            )
        large = torch.nn.functional.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
        assert torch.equal(found[p], (large[0, iou[0].argmax()] > 0) & inside[p])


def test_an_image_lies_in_its_part_of_the_square():
    inside = inside_square(torch.tensor([[64, 32], [1, 64]]), 64, 32)
    assert inside[0].sum() == 32 * 16
    assert bool(inside[0, :, :16].all())
    assert inside[1].sum() == 32  # never nothing


@pytest.mark.parametrize("size", [(64, 64), (1, 64), (64, 7), (8, 9), (40, 63)])
def test_at_the_grids_own_side_that_part_is_the_cells_that_count_as_image(size: tuple[int, int]):
    assert np.array_equal(inside_square(torch.tensor([size]), 64, 4)[0].numpy(), valid_cells(size, 64))


def make_part(annotated: list[bool]) -> Part:
    generator = torch.Generator().manual_seed(1)
    count = len(annotated)
    masks = torch.zeros(count, 2, 32, 32, dtype=torch.bool)
    masks[:, 0, :, :16] = True
    known = torch.zeros(count, 2, dtype=torch.bool)
    known[:, 0] = True
    return Part(
        student_BCHW=torch.randn(count, 256, 4, 4, generator=generator),
        teacher_BCHW=torch.randn(count, 256, 4, 4, generator=generator),
        valid_BHW=torch.ones(count, 4, 4, dtype=torch.bool),
        sizes_B2=torch.full((count, 2), 64),
        generator=torch.Generator().manual_seed(2),
        objects=AnnotatedObjects(masks_BQMM=masks, known_BQ=known, annotated_B=torch.tensor(annotated)),
    )


def test_annotations_count_where_an_image_has_them_and_the_teachers_masks_elsewhere(head: SamHead):
    mixed = batch_objects(head, make_part([True, False, True]), 2)
    assert mixed.image_P.tolist() == [0, 0, 1, 1, 2, 2]
    assert mixed.weight_P[[0, 1, 4, 5]].tolist() == [1, 0, 1, 0]
    assert torch.equal(mixed.masks_PMM[0], make_part([True]).objects.masks_BQMM[0, 0])
    teachers = batch_objects(head, make_part([False, False, False]), 2)
    assert torch.equal(mixed.masks_PMM[2:4], teachers.masks_PMM[2:4])
    own = batch_objects(head, make_part([True, True, True]), 2)
    assert own.weight_P.tolist() == [1, 0, 1, 0, 1, 0]


def test_a_place_without_an_object_has_neither_loss_nor_gradient(head: SamHead):
    emb_BCHW = torch.randn(1, 256, 4, 4, requires_grad=True)
    objects = Objects(
        masks_PMM=torch.zeros(2, 32, 32, dtype=torch.bool),
        image_P=torch.zeros(2, dtype=torch.long),
        inside_BMM=torch.ones(1, 32, 32, dtype=torch.bool),
        weight_P=torch.zeros(2),
    )
    loss, _ = MaskTraining(rounds=3, boxes=0.5).loss(
        head, emb_BCHW, objects, torch.Generator().manual_seed(0)
    )
    loss.backward()
    assert loss.item() == 0
    assert not emb_BCHW.grad.any()


def test_a_later_round_corrects_what_the_one_before_got_wrong(head: SamHead, monkeypatch: pytest.MonkeyPatch):
    """Seen from outside: the prompts that reach the decoder."""
    import mobilesam.distill.loss.masks as module

    seen = []
    real = module.decode_prompts

    def watched(head, emb, prompts):
        seen.append(prompts)
        return real(head, emb, prompts)

    monkeypatch.setattr(module, "decode_prompts", watched)
    part = make_part([True, True])
    objects = batch_objects(head, part, 2)
    training = MaskTraining(rounds=3, boxes=0.0)
    training.loss(head, part.student_BCHW, objects, torch.Generator().manual_seed(0))
    assert [prompts.points_PN2.shape[1] for prompts in seen] == [1, 2, 3]
    assert [prompts.masks_P1hw is None for prompts in seen] == [True, False, False]
    masks = objects.masks_PMM
    for p in (0, 2):
        x, y = ((seen[0].points_PN2[p, 0] + 0.5) / 2 - 0.5).long().tolist()
        assert bool(masks[p, y, x])
        large = torch.nn.functional.interpolate(
            seen[1].masks_P1hw, (32, 32), mode="bilinear", align_corners=False
        )
        answer = large[p, 0] > 0
        x, y = ((seen[1].points_PN2[p, 1] + 0.5) / 2 - 0.5).long().tolist()
        assert bool(answer[y, x]) != bool(masks[p, y, x])
        assert bool(seen[1].labels_PN[p, 1]) == bool(masks[p, y, x])


def test_the_mixed_loss_is_the_sum_of_its_parts(head: SamHead):
    training = MaskTraining(rounds=1, weights=MaskLossWeights())
    whole = WholeBatch(elements=3 * 256 * 16, images=3)

    def loss(mse: float) -> Tensor:
        options = MaskOptions(training=training, objects=2, mse=mse, region="all")
        return SemiCoupled(head, options).loss(make_part([True, False, True]), whole)

    part = make_part([True, False, True])
    wanted = torch.nn.functional.mse_loss(part.student_BCHW, part.teacher_BCHW)
    torch.testing.assert_close(loss(0.5) - loss(0.0), 0.5 * wanted)


@pytest.mark.cuda
@pytest.mark.parametrize("annotated", [[True, True], [True, False]])
def test_a_loss_of_masks_never_waits_for_a_gpu(head: SamHead, annotated: list[bool]):
    options = MaskOptions(
        training=MaskTraining(rounds=2, boxes=0.5, weights=MaskLossWeights()),
        objects=2,
        mse=1.0,
        region="all",
    )
    objective = SemiCoupled(copy.deepcopy(head).cuda(), options)
    part = make_part(annotated)
    assert part.objects is not None
    part = dataclasses.replace(
        part,
        student_BCHW=part.student_BCHW.cuda().requires_grad_(True),
        teacher_BCHW=part.teacher_BCHW.cuda(),
        valid_BHW=part.valid_BHW.cuda(),
        objects=part.objects.to(torch.device("cuda")),
    )
    whole = WholeBatch(elements=2 * 256 * 16, images=2)
    objective.loss(part, whole).backward()  # cuDNN sets itself up
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective.loss(part, whole).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert part.student_BCHW.grad is not None
    assert bool(part.student_BCHW.grad.isfinite().all())


def test_semi_coupled_leaves_the_head_as_it_is(masked_store: Path, options: Options):
    result = distill(options(masked_store, objective="semi_coupled", objects=2, epochs=1))
    run = Run.open(run_of(result))
    assert trained_head(run.path) is None
    assert 0 <= result["val"]["miou"] <= 1
    started = torch.load(run.path / "last.pt", weights_only=True)["student"]
    assert not any("mask_decoder" in key for key in started)
    assert not same(weights(run.path, "image_encoder."), new_student_weights())


def new_student_weights(seed: int = 0) -> dict[str, Tensor]:
    from mobilesam.distill import build_student

    student = build_student("tiny_vit", 64, seed)
    return {f"image_encoder.{key}": value for key, value in student.state_dict().items()}


def test_coupled_trains_both_and_the_student_carries_its_head(
    labelled_store: Path, options: Options, head_tensors: dict[str, Tensor]
):
    result = distill(options(labelled_store, objective="coupled", labels="annotations", objects=2, epochs=1))
    path = run_of(result)
    head = trained_head(path)
    assert head is not None
    assert head.keys() == head_tensors.keys()
    # All but the random frequencies, which SAM never trains, and what no prompt of this run has used.
    unchanged = [key for key in head if torch.equal(head[key], head_tensors[key])]
    assert "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix" in unchanged
    assert not any(key.startswith("mask_decoder.transformer") and key.endswith("weight") for key in unchanged)
    assert not same(weights(path, "image_encoder."), new_student_weights())
    # The store's own head stays what it was.
    assert same(load_file(path / "sam_head.safetensors"), head_tensors)


def test_decoder_trains_the_head_alone_statistics_of_batch_norms_included(
    masked_store: Path, options: Options, head_tensors: dict[str, Tensor]
):
    student = run_of(distill(options(masked_store, epochs=1, out="student")))
    finished = distill(
        options(masked_store, objective="decoder", init=student, objects=2, epochs=2, out="decoder")
    )
    encoder = weights(run_of(finished), "image_encoder.")
    assert same(encoder, weights(student, "image_encoder."))
    assert any("running_var" in key for key in encoder)
    head = trained_head(run_of(finished))
    assert head is not None
    assert not same(head, head_tensors)
    # A student with a head of its own goes on from that one.
    again = distill(
        options(
            masked_store,
            objective="decoder",
            init=run_of(finished),
            objects=2,
            epochs=1,
            lr=1e-12,
            out="again",
        )
    )
    for key, value in weights(run_of(again), HEAD_PREFIXES).items():
        torch.testing.assert_close(value, head[key], rtol=0, atol=1e-8)


def test_decoder_wants_a_finished_student(masked_store: Path, options: Options, tmp_path: Path):
    with pytest.raises(DistillError, match="name its run or file with --init"):
        options(masked_store, objective="decoder")
    state = {key.removeprefix("image_encoder."): value for key, value in new_student_weights().items()}
    state = {key: value for key, value in state.items() if not key.startswith("neck.")}
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(DistillError, match=r"no finished tiny_vit: \d+ of its weights are missing"):
        distill(options(masked_store, objective="decoder", init=tmp_path / "part.pt"))


@pytest.mark.parametrize("objective", ["semi_coupled", "coupled"])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    masked_store: Path, options: Options, objective: str
):
    asked = {"objective": objective, "objects": 2, "rounds": 1, "epochs": 1}
    whole = run_of(distill(options(masked_store, out="whole", **asked)))
    stop = StopFlag()

    def at_step_two(progress: Any) -> None:
        if progress.step == 2:
            stop.set()

    with pytest.raises(DistillInterrupted):
        distill(options(masked_store, out="parts", **asked), progress=at_step_two, stop=stop)
    parts = run_of(distill(options(masked_store, out="parts", **asked)))
    assert same(
        weights(whole, ("image_encoder.", *HEAD_PREFIXES)), weights(parts, ("image_encoder.", *HEAD_PREFIXES))
    )


def test_prompts_are_the_same_whoever_computes_a_micro_batch():
    drawn = [torch.rand(4, generator=part_generator(0, 1, 7)) for _ in range(2)]
    assert torch.equal(*drawn)
    others = [(1, 1, 7), (0, 2, 7), (0, 1, 8)]
    assert not any(torch.equal(drawn[0], torch.rand(4, generator=part_generator(*other))) for other in others)


def test_broken_annotations_fail_their_image_by_name_and_the_run_goes_on(
    labelled_store: Path, options: Options, caplog: pytest.LogCaptureFixture
):
    root = labelled_root(labelled_store)
    first, second, *_ = sorted(root.glob("*.json"))
    first.write_text("{broken")
    second.unlink()  # none at all: the teacher's masks
    result = distill(options(labelled_store, objective="coupled", labels="annotations", objects=2, epochs=2))
    assert result["epochs"] == 2
    named = [record.message for record in caplog.records if "trained without masks" in record.message]
    trained = Run.open(run_of(result)).split.train
    assert len(named) == (0 in trained)
    assert all(first.stem in line for line in named)
    count = len(list(root.glob("*.json")))
    assert result["labels"] == {
        "annotated": count, "images": count + 1, "empty": 0, "broken": int(0 in trained)
    }  # fmt: skip
    assert any(f"annotations beside {count} of {count + 1} images" in line for line in summary_lines(result))


def test_annotations_that_are_nowhere_are_refused(masked_store: Path, options: Options):
    with pytest.raises(DistillError, match=r"none of the \d+ images in .* has annotations beside it"):
        distill(options(masked_store, objective="coupled", labels="annotations"))


def test_annotations_that_came_later_are_not_passed_over(labelled_store: Path, options: Options):
    root = labelled_root(labelled_store)
    first, *_ = sorted(root.glob("*.json"))
    kept = first.read_bytes()
    first.unlink()
    asked = options(labelled_store, objective="coupled", labels="annotations", objects=1, rounds=1, epochs=1)
    distill(dataclasses.replace(asked, out=Path("one")))
    first.write_bytes(kept)
    with pytest.raises(DistillError, match=r"begun differently \(annotated: \d+ then, \d+ now\)"):
        distill(dataclasses.replace(asked, out=Path("one")))


def test_an_images_loss_is_the_mean_over_the_objects_that_it_has(head: SamHead):
    part = make_part([True, True])
    part.objects.known_BQ[1] = True
    part.objects.masks_BQMM[1, 1, 8:] = True
    assert batch_objects(head, part, 2).weight_P.tolist() == [1, 0, 0.5, 0.5]


def test_objects_outside_the_image_are_none(head: SamHead):
    part = dataclasses.replace(make_part([True]), sizes_B2=torch.tensor([[16, 64]]))
    part.objects.masks_BQMM[0, 0] = False
    part.objects.masks_BQMM[0, 0, 20:] = True  # below the 8 rows that are image
    objects = batch_objects(head, part, 2)
    assert not objects.masks_PMM.any()
    assert objects.weight_P.tolist() == [0, 0]


def test_the_rate_of_what_is_trained_is_logged(masked_store: Path, options: Options, tmp_path: Path):
    finished = run_of(distill(options(masked_store, epochs=1, out="start")))
    asked = {"objects": 1, "rounds": 1, "epochs": 1, "warmup": 0.0}
    coupled = Run.open(run_of(distill(options(masked_store, objective="coupled", out="c", **asked))))
    decoder = Run.open(
        run_of(distill(options(masked_store, objective="decoder", init=finished, out="d", **asked)))
    )
    line = next(line for line in coupled.history() if line["kind"] == "train")
    assert line["lr_head"] == pytest.approx(0.1 * line["lr"])
    line = next(line for line in decoder.history() if line["kind"] == "train")
    assert "lr" not in line
    assert line["lr_head"] == pytest.approx(1e-4)


def test_a_head_that_no_prompt_used_decays_as_with_several_processes():
    used, unused = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    both = torch.nn.ModuleList([used, unused])
    used(torch.ones(1, 2)).sum().backward()
    fill_gradients(both)
    assert unused.weight.grad is not None
    assert not unused.weight.grad.any()
    assert used.weight.grad.any()


def test_the_head_in_a_file_of_mobile_sams_format_is_its_encoders(
    labelled_store: Path, options: Options, tmp_path: Path
):
    result = distill(options(labelled_store, objective="coupled", labels="annotations", objects=1, epochs=1))
    own = trained_head(run_of(result))
    export(ExportConfig(student=run_of(result), out=tmp_path / "x.pt"))
    found = trained_head(tmp_path / "x.pt")
    assert found is not None
    assert own is not None
    assert all(torch.equal(found[key], own[key]) for key in own)


def labelled_root(store: Path) -> Path:
    from mobilesam.store import EmbeddingStore

    with EmbeddingStore.open(store) as opened:
        return Path(opened.spec.image_root)


def test_masks_need_a_store_with_a_head(store: Path, options: Options):
    with pytest.raises(DistillError, match="is not a SAM head"):
        distill(options(store, objective="semi_coupled"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objects": 3}, "compares no masks"),
        (
            {"objective": "coupled", "focal_weight": 0.0, "dice_weight": 0.0},
            "nothing trains the masks",
        ),
        ({"objective": "coupled", "boxes": 1.5}, "from 0 to 1"),
        ({"objective": "coupled", "rounds": 0}, "at least 1"),
        ({"objective": "masks"}, "objective must be decoupled"),
        ({"objective": "decoder", "init": "x", "mse_weight": 1.0}, "trains no encoder"),
    ],
)
def test_options_that_make_no_sense_are_refused(store: Path, options: Options, changes: dict, message: str):
    with pytest.raises(DistillError, match=message):
        options(store, **changes)


def test_the_decoupled_objective_has_the_identity_that_it_always_had(store: Path, options: Options):
    assert not options(store).identity().keys() & {"objective", "objects", "rounds", "labels"}
    assert options(store, objective="coupled").identity()["rounds"] == 2


def test_the_loss_teaches_an_embedding_and_its_head_which_object_is_meant():
    """Without an encoder: the embedding itself is trained, on two objects side by side."""
    torch.manual_seed(0)
    head, emb_1CHW = SamHead(64), torch.nn.Parameter(torch.randn(1, 256, 4, 4))
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, :, :12] = masks[1, 8:, 16:] = True
    objects = Objects(
        masks_PMM=masks.repeat(4, 1, 1),
        image_P=torch.zeros(8, dtype=torch.long),
        inside_BMM=torch.ones(1, 32, 32, dtype=torch.bool),
        weight_P=torch.ones(8),
    )
    optimizer = torch.optim.Adam([emb_1CHW, *head.parameters()], lr=5e-4)
    generator, training = torch.Generator().manual_seed(0), MaskTraining(rounds=1, boxes=0.0)
    picked = []
    for _ in range(60):
        loss, found = training.loss(head, emb_1CHW, objects, generator)
        optimizer.zero_grad()
        (loss / 8).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        picked.append(found.item() / 8)
    assert sum(picked[:5]) / 5 < 0.5
    assert sum(picked[-5:]) / 5 > 0.9
