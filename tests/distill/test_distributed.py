"""Several processes under torchrun compute what one process computes that accumulates the same micro-batches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mobilesam.distill import DistillConfig, DistillError, Run, distill
from mobilesam.distill.distributed import ProcessGroup, join_process_group
from mobilesam.distill.students.student_file import trained_head
from mobilesam.sam.modeling.head import SamHead

SIZES = [(40, 60), (64, 64), (60, 30), (20, 64), (64, 50), (33, 64), (64, 20), (50, 64), (64, 40), (30, 60)]
MakeStore = Callable[..., Path]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def ten_images(save_images: Callable[..., Path]) -> Path:
    return save_images(SIZES, seed=5)


@pytest.fixture(scope="module")
def ten_rows(ten_images: Path, make_store: MakeStore) -> Path:
    return make_store(ten_images)


def command(store: Path, out: str, *options: str, processes: int | None) -> list[str]:
    start = [sys.executable] if processes is None else [*TORCHRUN, str(processes)]
    return [
        *start, "-m", "mobilesam", "distill", "--store", str(store), "--out", out, "--epochs", "2",
        "--batch-size", "4", "--micro-batch", "1", "--device", "cpu", "--precision", "float32", "--json", *options,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def trained(store: Path, out: str, *options: str, processes: int | None = None) -> dict[str, Any]:
    done = subprocess.run(
        command(store, out, *options, processes=processes),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # one object, of one process


def coco_file(images: Path) -> Path:
    """Label the left half of each picture but the last two; the third one's label has no outline."""
    listed, objects = [], []
    for number, (path, (height, width)) in enumerate(zip(sorted(images.iterdir()), SIZES, strict=True)):
        half = [] if number == 2 else [[0, 0, width // 2, 0, width // 2, height, 0, height]]
        if number < 8:
            listed.append({"id": number, "file_name": path.name, "height": height, "width": width})
            objects.append({"id": number, "image_id": number, "segmentation": half})
    Path("labels.json").write_text(json.dumps({"images": listed, "annotations": objects}))
    return Path("labels.json")


def lines(out: str, kind: str) -> list[dict[str, Any]]:
    return [line for line in Run.open(out).history() if line["kind"] == kind]


def assert_same_training(one: str, many: str) -> None:
    mine, theirs = lines(one, "train"), lines(many, "train")
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for line, other in zip(mine, theirs, strict=True):
        # Sums in another order: rounding, which AdamW's division by small moments lets grow from step to step.
        for name in ("loss", "grad_norm", "lr"):
            assert other[name] == pytest.approx(line[name], rel=2e-5 * line["step"]), (line["step"], name)


def assert_same_weights(one: str, many: str, *, buffers: bool) -> None:
    first, second = (Run.open(out).student()[0] for out in (one, many))
    named = first.state_dict() if buffers else dict(first.named_parameters())
    others = second.state_dict()
    for name, value in named.items():
        torch.testing.assert_close(others[name], value.detach(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_student_without_batch_norm_learns_the_same_from_one_global_batch(
    ten_rows: Path, processes: int
) -> None:
    # The command's options, in this process.
    distill(
        DistillConfig(
            store=ten_rows, out=Path("one"), epochs=2, batch_size=4, micro_batch=1, device="cpu",
            precision="float32", student="deit_tiny", lr=1.5e-4,
        )
    )  # fmt: skip
    result = trained(ten_rows, "many", "--student", "deit_tiny", "--lr", "1.5e-4", processes=processes)
    assert_same_training("one", "many")
    assert_same_weights("one", "many", buffers=True)
    alone = lines("one", "result")[0]
    for name in ("mse", "mse_valid", "relative_mse", "skill", "skill_valid"):
        assert result["val"][name] == pytest.approx(alone["val"][name], rel=1e-4), name
    assert Run.open("many").description.resolved.processes == processes
    torch.testing.assert_close(
        Run.open("one").mean_embedding(), Run.open("many").mean_embedding(), rtol=1e-6, atol=1e-7
    )
    assert json.loads(json.dumps(result["steps"])) == alone["steps"]


@pytest.mark.long
def test_batch_norms_over_one_pooled_value_train_in_every_process(ten_rows: Path) -> None:
    # Batches of four images in micro-batches of one: every norm over one value uses its running statistics.
    result = trained(ten_rows, "many", "--student", "timm:skresnet18", "--epochs", "1", processes=2)
    trained(ten_rows, "one", "--student", "timm:skresnet18", "--epochs", "1")
    assert result["steps"] == lines("one", "result")[0]["steps"] == 3
    first, other = (lines(run, "train")[0] for run in ("one", "many"))
    assert other["loss"] == pytest.approx(first["loss"], rel=1e-4)


@pytest.mark.long
def test_tiny_vit_has_the_losses_of_one_process_while_batch_norms_use_the_batch(ten_rows: Path) -> None:
    # Whole batches of one image each: the last step's halves are frozen statistics, which are the first process's.
    trained(ten_rows, "one", "--epochs", "1")
    trained(ten_rows, "many", "--epochs", "1", processes=2)
    before_freeze = [line for line in lines("one", "train") if line["step"] <= 1]
    assert before_freeze
    for line, other in zip(before_freeze, lines("many", "train"), strict=False):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("labelled", [False, True], ids=["teacher", "coco"])
def test_two_processes_train_student_and_head_by_masks_as_one_does(
    labelled: bool, ten_images: Path, make_store: MakeStore
) -> None:
    torch.manual_seed(0)
    store = make_store(
        ten_images, head={key: value.numpy() for key, value in SamHead(64).state_dict().items()}
    )
    # One round, since a correction's place depends on which side of 0 each logit lies, and so on rounding; and steps
    # so small that AdamW, which divides each gradient by its size, can't make much of the smallest ones' rounding.
    options = (
        "--student",
        "deit_tiny",
        "--objective",
        "coupled",
        "--objects",
        "2",
        "--rounds",
        "1",
        "--lr",
        "1e-9",
    )
    if labelled:
        options += ("--coco", str(coco_file(ten_images)))
    one, many = trained(store, "one", *options), trained(store, "many", *options, processes=2)
    assert one.get("labels") == many.get("labels")
    assert (one["labels"]["objects"] > 4) if labelled else ("labels" not in one)
    assert_same_training("one", "many")
    assert_same_weights("one", "many", buffers=True)
    assert many["val"]["miou"] == pytest.approx(one["val"]["miou"], abs=1e-4)
    assert many["val"]["prompts"] == one["val"]["prompts"] == 16
    assert trained_head("one") is not None
    assert trained_head("many") is not None


@pytest.mark.long
def test_interrupted_processes_resume_where_they_were(ten_rows: Path) -> None:
    options = ("--student", "deit_tiny", "--epochs", "6")
    process = subprocess.Popen(
        command(ten_rows, "stopped", *options, processes=2),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = Path("stopped/metrics.jsonl")
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to both
    _, told = process.communicate()
    assert process.returncode != 0
    assert told.count("stopped after step") == 1, told
    trained(ten_rows, "stopped", *options, processes=2)
    trained(ten_rows, "one", *options)
    assert_same_training("one", "stopped")
    assert_same_weights("one", "stopped", buffers=True)
    # Any number of processes resumes any other's run, here a finished one.
    assert trained(ten_rows, "stopped", *options)["steps"] == lines("one", "result")[0]["steps"]


def test_an_error_in_one_process_stops_all_and_is_reported(ten_images: Path, make_store: MakeStore) -> None:
    images = Path("copy")
    images.mkdir()
    for file in ten_images.iterdir():
        (images / file.name).write_bytes(file.read_bytes())
    store = make_store(images.absolute())
    victim = images / "03.png"
    victim.write_bytes(victim.read_bytes() + b"more")
    done = subprocess.run(
        command(store, "broken", processes=2),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "03.png" in done.stderr
    assert done.stdout == ""


@pytest.mark.long
def test_refusals_reach_every_process(ten_rows: Path) -> None:
    trained(ten_rows, "run", "--student", "deit_tiny")
    done = subprocess.run(
        command(ten_rows, "run", "--student", "deit_tiny", "--seed", "3", processes=2),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode != 0
    assert "was begun differently" in done.stderr


def test_shares_of_all_ranks_are_a_partition() -> None:
    items = list(range(7))
    shares: list[Sequence[int]] = [ProcessGroup(rank=rank, world_size=3).share_of(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert ProcessGroup().share_of(items) == items


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    processes = ProcessGroup(rank=5, world_size=8, local_rank=1)
    assert processes.local_device("auto") == "cuda:1"
    assert processes.local_device("cuda") == "cuda:1"
    assert processes.local_device("cuda:3") == "cuda:3"
    assert processes.local_device("cpu") == "cpu"
    assert ProcessGroup().local_device("auto") == "auto"


def test_an_incomplete_torchrun_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(DistillError, match=r"WORLD_SIZE is 2, but RANK.*torchrun"), join_process_group():
        pass
