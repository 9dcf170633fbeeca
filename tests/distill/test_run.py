"""A finished run and its result; stores and options that are refused before training."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mobilesam.distill import (
    ComputeSettings,
    DistillConfig,
    DistillError,
    Run,
    distill,
    evaluate,
    load_student,
    mean_embedding,
)
from mobilesam.distill.data.loader import default_workers
from mobilesam.distill.run_description import ResolvedSettings
from mobilesam.store import Audit, EmbeddingStore

Options = Callable[..., DistillConfig]


@pytest.fixture(scope="module")
def finished(
    store: Path, options: Options, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A directory in which one run was trained, and what distill() returned."""
    home = tmp_path_factory.mktemp("home")
    before = Path.cwd()
    os.chdir(home)
    try:
        return home, distill(options(store, micro_batch=1, loss_region="valid"))
    finally:
        os.chdir(before)


@pytest.fixture
def run(finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(finished[0])
    return Run.open()


def test_the_result_has_the_documented_keys_in_order(finished: tuple[Path, dict[str, Any]], run: Run) -> None:
    result = finished[1]
    assert list(result) == [
        *("run", "epochs", "steps", "seconds", "images_per_second", "data_wait_share", "finished", "val"),
        *("images", "batch_size", "too_few_steps", "advised_epochs", "advised_batch_size", "train"),
        "no_better_than_constant",
        "already_finished",
    ]
    assert (result["run"], result["epochs"], result["steps"]) == (str(run.path), 2, 6)
    metrics = {
        name + suffix for name in ("mse", "relative_mse", "cosine", "skill") for suffix in ("", "_valid")
    }
    assert set(result["val"]) == set(result["train"]) == metrics
    assert (result["images"], result["batch_size"]) == ({"train": 5, "val": 1}, 2)
    assert (result["too_few_steps"], result["advised_epochs"], result["advised_batch_size"]) == (True, 167, 2)
    assert result["no_better_than_constant"] is (result["train"]["skill_valid"] <= 0)
    assert 0 <= result["data_wait_share"] <= 1
    assert json.loads(json.dumps(result)) == result


def test_the_folder_holds_what_verify_and_tensorboard_need(run: Run, store: Path) -> None:
    names = {path.name for path in run.path.iterdir()}
    assert names >= {
        "config.json", "split.json", "metrics.jsonl", "last.pt", "student.safetensors",
        "sam_head.safetensors", "mean_embedding.safetensors",
    }  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith(".partial") for name in names)
    with EmbeddingStore.open(store) as opened:
        assert run.head_path.read_bytes() == opened.head_path.read_bytes()


def test_the_name_is_the_student_with_a_digest_and_latest_is_a_relative_link(run: Run) -> None:
    name = os.readlink("runs/latest")
    assert name == run.path.name
    assert name.startswith("tiny_vit-")
    assert len(name) == len("tiny_vit-") + 8


def test_the_runs_description_holds_where_it_came_from(run: Run, store: Path, images: Path) -> None:
    with EmbeddingStore.open(store) as opened:
        assert run.description.store.spec == opened.spec
    assert run.store_path == store.resolve()
    assert run.image_root == images.resolve()
    assert run.description.counts == {"done": 6, "failed": 0, "pending": 0}
    assert run.description.resolved == ResolvedSettings(
        device="cpu", precision="float32", micro_batch=1, processes=1
    )
    assert torch.__version__.startswith(run.description.versions["torch"])


def test_each_kind_of_line_is_in_the_metrics(run: Run) -> None:
    kinds = [line["kind"] for line in run.history()]
    assert kinds == ["train"] * 3 + ["val"] + ["train"] * 3 + ["val", "train_eval", "result"]
    assert [line["step"] for line in run.history() if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_the_mean_embedding_is_that_of_the_training_rows(run: Run, store: Path) -> None:
    with EmbeddingStore.open(store) as opened:
        rows = opened.read(run.split.train).to_float32().astype("float64").mean(axis=0)
        assert torch.equal(mean_embedding(opened, run.split.train), run.mean_embedding())
    torch.testing.assert_close(run.mean_embedding(), torch.from_numpy(rows).float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("kind", "rows"), [("train_eval", "train"), ("val", "val")])
def test_the_saved_student_gives_the_numbers_that_were_logged(
    run: Run, store: Path, images: Path, kind: str, rows: str
) -> None:
    student, info = load_student(run.path)
    assert info["epoch"] == 2
    logged = run.last(kind)
    assert logged is not None
    counted = []
    with EmbeddingStore.open(store) as opened:
        result, per_image = evaluate(
            student,
            opened,
            getattr(run.split, rows),
            images,
            ComputeSettings(device=torch.device("cpu"), precision="float32", batch_size=4),
            mean_embedding=run.mean_embedding(),
            on_image=lambda done, total: counted.append((done, total)),
        )
    assert len(per_image) == logged["rows"] == counted[-1][0] == counted[-1][1]
    for name, value in result.items():
        assert logged[name] == pytest.approx(value, rel=1e-4), name


def test_batch_norms_learn_their_statistics_in_the_first_half_only(run: Run) -> None:
    # Three of six steps, of two, two and one images, one image at a time.
    state = load_student(run.path)[0].state_dict()
    counts = {int(value) for name, value in state.items() if name.endswith("num_batches_tracked")}
    assert counts == {5}


def test_a_finished_run_reports_its_result_again_without_training(
    finished: tuple[Path, dict[str, Any]], run: Run, store: Path, options: Options
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in run.path.iterdir() if path.name != "run.lock"}
    again = distill(options(store, micro_batch=1, loss_region="valid"))
    assert again == {**finished[1], "already_finished": True}
    assert before == {
        path.name: path.stat().st_mtime_ns for path in run.path.iterdir() if path.name != "run.lock"
    }


def test_a_store_without_finished_rows_is_refused(
    images: Path, make_store: Callable[..., Path], options: Options
) -> None:
    with pytest.raises(DistillError, match=r"no finished rows \(6 pending, 0 failed\)"):
        distill(options(make_store(images, commit=False)))
    assert not Path("runs").exists()


def test_failed_rows_are_left_out_with_a_warning(
    images: Path,
    make_store: Callable[..., Path],
    options: Options,
    small: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        distill(options(make_store(images, failed=[1, 4]), epochs=1, student=small))
    assert "the 4 finished rows; 0 are pending, 2 failed" in caplog.text
    run = Run.open()
    assert run.description.counts == {"done": 4, "failed": 2, "pending": 0}
    assert sorted([*run.split.train, *run.split.val]) == [0, 2, 3, 5]


def test_a_store_that_failed_its_audit_is_warned_of_before_training(
    images: Path,
    make_store: Callable[..., Path],
    options: Options,
    small: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = make_store(images)
    with EmbeddingStore.open(path, writable=True) as store:
        store.record_audits([Audit(row=0, cosine=0.3, relative_mse=2.0)])
    with caplog.at_level(logging.WARNING):
        distill(options(path, epochs=1, student=small))
    assert "1 audited rows differ from the teacher's embeddings" in caplog.text


def test_moved_images_are_named_and_found_again(
    save_images: Callable[..., Path], make_store: Callable[..., Path], options: Options, small: str
) -> None:
    images = save_images([(64, 64), (30, 64)])
    store = make_store(images)
    moved = images.rename(images.with_name("moved"))
    with pytest.raises(DistillError, match="--images"):
        distill(options(store, epochs=1, student=small))
    distill(options(store, epochs=1, student=small, images=moved))
    assert Run.open().image_root == moved


def test_a_set_of_copies_of_one_image_is_refused(
    tmp_path: Path, save_images: Callable[..., Path], make_store: Callable[..., Path], options: Options
) -> None:
    images = save_images([(64, 64)])
    (images / "copy.png").write_bytes((images / "00.png").read_bytes())
    with pytest.raises(DistillError, match="1 distinct"):
        distill(options(make_store(images)))


def test_an_unknown_student_is_refused_before_anything_is_made(store: Path, options: Options) -> None:
    with pytest.raises(DistillError, match="tiny_vit"):
        distill(options(store, student="giant_vit"))
    assert not Path("runs").exists()


@pytest.mark.long
def test_a_compiled_student_learns_the_same_and_keeps_its_names(
    store: Path, options: Callable[..., DistillConfig]
) -> None:
    eager = distill(options(store, student="deit_tiny", out=Path("eager")))
    compiled = distill(options(store, student="deit_tiny", out=Path("compiled"), compile=True))
    assert compiled["val"]["mse"] == pytest.approx(eager["val"]["mse"], rel=1e-3)
    names = [set(Run.open(out).student()[0].state_dict()) for out in ("eager", "compiled")]
    assert names[0] == names[1]


def test_a_student_that_cannot_be_compiled_says_so(
    store: Path, options: Callable[..., DistillConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def failing(*_: object) -> None:
        raise TorchDynamoException("no C++ compiler\nand much more")

    monkeypatch.setattr("mobilesam.distill.trainer.Trainer.fit", failing)
    with pytest.raises(
        DistillError, match=r"can't compile tiny_vit here \(no C\+\+ compiler\); leave out --compile"
    ):
        distill(options(store, compile=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_there_is_a_decoding_thread_on_every_device(device: str) -> None:
    assert default_workers(torch.device(device)) >= 1
