"""Runs of the objectives that compare masks: the weights that each trains, by teacher's masks and annotations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mobilesam.distill import (
    DistillConfig,
    DistillError,
    DistillInterrupted,
    Run,
    StopFlag,
    build_student,
    distill,
)
from mobilesam.distill.recipe import RECIPES
from mobilesam.distill.run import summary_lines
from mobilesam.distill.students.student_file import trained_head
from mobilesam.predict import ExportConfig, export
from mobilesam.sam.modeling.head_shapes import HEAD_PREFIXES
from mobilesam.store import EmbeddingStore

Options = Callable[..., DistillConfig]


def weights(run: Path, prefixes: str | tuple[str, ...]) -> dict[str, Tensor]:
    return {k: v for k, v in load_file(run / "student.safetensors").items() if k.startswith(prefixes)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def run_of(result: dict[str, Any]) -> Path:
    return Path(result["run"])


def new_student_weights(seed: int = 0) -> dict[str, Tensor]:
    student = build_student("tiny_vit", 64, seed)
    return {f"image_encoder.{key}": value for key, value in student.state_dict().items()}


def labelled_root(store: Path) -> Path:
    with EmbeddingStore.open(store) as opened:
        return Path(opened.spec.image_root)


def test_semi_coupled_leaves_the_head_as_it_is(masked_store: Path, options: Options):
    result = distill(options(masked_store, objective="semi_coupled", objects=2, epochs=1))
    run = Run.open(run_of(result))
    assert trained_head(run.path) is None
    assert 0 <= result["val"]["miou"] <= 1
    started = torch.load(run.path / "last.pt", weights_only=True)["student"]
    assert not any("mask_decoder" in key for key in started)
    assert not same(weights(run.path, "image_encoder."), new_student_weights())


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
def test_a_resumed_run_with_masks_ends_with_the_same_weights(
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


def test_broken_annotations_are_reported_by_image_and_the_run_goes_on(
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
        "annotated": count, "images": count + 1, "empty": 0, "broken": int(0 in trained),
        "objects": 2 * len(set(trained) - {0, 1}), "left_out": {},
    }  # fmt: skip
    assert any(f"annotations beside {count} of {count + 1} images" in line for line in summary_lines(result))


def test_labels_by_annotations_need_an_annotated_image(masked_store: Path, options: Options):
    with pytest.raises(DistillError, match=r"none of the \d+ images in .* has annotations beside it"):
        distill(options(masked_store, objective="coupled", labels="annotations"))


def test_a_run_is_not_resumed_with_annotations_that_were_added_later(labelled_store: Path, options: Options):
    root = labelled_root(labelled_store)
    first, *_ = sorted(root.glob("*.json"))
    kept = first.read_bytes()
    first.unlink()
    asked = options(labelled_store, objective="coupled", labels="annotations", objects=1, rounds=1, epochs=1)
    distill(dataclasses.replace(asked, out=Path("one")))
    first.write_bytes(kept)
    with pytest.raises(DistillError, match=r"begun differently \(annotated: \d+ then, \d+ now\)"):
        distill(dataclasses.replace(asked, out=Path("one")))


def test_the_learning_rate_of_each_trained_part_is_logged(
    masked_store: Path, options: Options, tmp_path: Path
):
    finished = run_of(distill(options(masked_store, epochs=1, out="start")))
    asked = {"objects": 1, "rounds": 1, "epochs": 1, "warmup": 0.0}
    coupled = Run.open(run_of(distill(options(masked_store, objective="coupled", out="c", **asked))))
    decoder = Run.open(
        run_of(distill(options(masked_store, objective="decoder", init=finished, out="d", **asked)))
    )
    line = next(line for line in coupled.history() if line["kind"] == "train")
    assert line["lr_head"] == pytest.approx(RECIPES["mobilesam-2026"].head_lr_share * line["lr"])
    line = next(line for line in decoder.history() if line["kind"] == "train")
    assert "lr" not in line
    assert line["lr_head"] == pytest.approx(1e-4)


def test_a_head_in_mobile_sams_format_counts_as_trained_with_its_encoder(
    labelled_store: Path, options: Options, tmp_path: Path
):
    result = distill(options(labelled_store, objective="coupled", labels="annotations", objects=1, epochs=1))
    own = trained_head(run_of(result))
    export(ExportConfig(student=run_of(result), out=tmp_path / "x.pt"))
    found = trained_head(tmp_path / "x.pt")
    assert found is not None
    assert own is not None
    assert all(torch.equal(found[key], own[key]) for key in own)


def test_objectives_with_masks_need_a_store_with_a_sam_head(store: Path, options: Options):
    with pytest.raises(DistillError, match="is not a SAM head"):
        distill(options(store, objective="semi_coupled"))
