"""A resumed run equals the run that was never interrupted, bit for bit (CPU, float32)."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mobilesam.distill import (
    DistillConfig,
    DistillError,
    DistillInterrupted,
    Progress,
    Run,
    StopFlag,
    distill,
)
from mobilesam.distill.checksummed_json import read_checksummed, write_checksummed
from mobilesam.sam import ImageError

Options = Callable[..., DistillConfig]

# Times alone may differ, and so the line's checksum.
CLOCKS = ("images_per_second", "data_wait_share", "seconds", "finished", "run", "crc32")


def numbers(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    assert numbers(one) == numbers(other)
    for name in ("student.safetensors", "mean_embedding.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def interrupted_at(step: int, phase: str, config: DistillConfig) -> DistillInterrupted:
    """Trains until `step` steps are done and the phase is reached, then asks it to stop."""
    flag = StopFlag()

    def watch(progress: Progress) -> None:
        if progress.step == step and progress.phase == phase:
            flag.set(signal.SIGTERM)

    with pytest.raises(DistillInterrupted) as caught:
        distill(config, progress=watch, stop=flag)
    return caught.value


@pytest.fixture(scope="module")
def small_options(options: Options, small: str) -> Options:
    """Options of runs by the smallest student: what a run saves and finds again is the same for all."""
    return partial(options, student=small)


@pytest.fixture(scope="module")
def whole(store: Path, small_options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run: 5 training images, 3 steps an epoch, the last one of a single image."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    before = Path.cwd()
    os.chdir(folder.parent)
    try:
        distill(small_options(store, out=folder))
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize(
    ("step", "phase"),
    [(2, "train"), (3, "validate"), (4, "train"), (6, "evaluate")],
)
def test_resumed_and_uninterrupted_runs_are_equal_to_the_bit(
    store: Path, small_options: Options, whole: Path, step: int, phase: str
) -> None:
    error = interrupted_at(step, phase, small_options(store, out="run"))
    assert error.signum == signal.SIGTERM
    assert f"after step {step} of 6" in str(error)
    distill(small_options(store, out="run"))
    assert_same_run(Path("run"), whole)


def test_tiny_vit_at_256_pixels_resumes_to_the_bit_after_several_interruptions(
    save_images: Callable[..., Path], make_store: Callable[..., Path], options: Options
) -> None:
    store = make_store(
        save_images([(200, 256), (256, 100), (90, 90), (256, 256)]), image_size=256, dtype="int8"
    )
    config = options(store, out="run")
    distill(options(store, out="whole"))
    for step in (1, 2, 3):
        interrupted_at(step, "train", config)
    distill(config)
    assert_same_run(Path("run"), Path("whole"))


def test_what_was_logged_after_the_last_checkpoint_is_cut_off(
    store: Path, small_options: Options, whole: Path
) -> None:
    interrupted_at(2, "train", small_options(store, out="run"))
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"kind":"train","epoch":1,"step":3,"loss":77}\n{"kind":"tra')
    distill(small_options(store, out="run"))
    assert_same_run(Path("run"), whole)


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    store: Path, small_options: Options, whole: Path
) -> None:
    interrupted_at(1, "train", small_options(store, out="run"))
    Path("run/last.pt").unlink()
    distill(small_options(store, out="run"))
    assert_same_run(Path("run"), whole)


def test_the_micro_batch_and_precision_once_resolved_are_kept(store: Path, small_options: Options) -> None:
    interrupted_at(1, "train", small_options(store, out="run", epochs=1, precision="auto"))
    config = read_checksummed(Path("run/config.json"))
    config["resolved"].update(precision="bfloat16", micro_batch=1)
    write_checksummed(Path("run/config.json"), config)
    phases = []
    distill(
        small_options(store, out="run", epochs=1, precision="auto"),
        progress=lambda progress: phases.append(progress.phase),
    )
    # One image at a time: the five training rows are judged in five batches, not in three.
    assert phases.count("evaluate") == 5
    assert Run.open("run").description.resolved.precision == "bfloat16"


def test_a_checkpoint_is_written_when_checkpoint_seconds_have_passed(
    store: Path, small_options: Options
) -> None:
    seen = []

    def watch(progress: Progress) -> None:
        if progress.phase == "train":
            seen.append(Path("run/last.pt").exists())

    distill(small_options(store, out="run", epochs=1, checkpoint_seconds=1e-9), progress=watch)
    assert seen == [False, True, True]


@pytest.mark.parametrize("damage", ["truncated", "pickle", "other"])
def test_a_damaged_checkpoint_is_one_clear_error_and_runs_no_code(
    store: Path, small_options: Options, damage: str
) -> None:
    interrupted_at(1, "train", small_options(store, out="run"))
    path = Path("run/last.pt")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "pickle":
        torch.save({"format": 1, "student": Options}, path)
    else:
        torch.save({"format": 1, "student": {}, "optimizer": {}, "state": {}, "rng": {}}, path)
    with pytest.raises(DistillError, match="--restart"):
        distill(small_options(store, out="run"))


def test_a_signal_saves_a_checkpoint_and_the_error_has_its_number(
    store: Path, small_options: Options
) -> None:
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]

    def watch(progress: Progress) -> None:
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(DistillInterrupted) as caught:
        distill(small_options(store, out="run"), progress=watch)
    assert caught.value.signum == signal.SIGINT
    saved = torch.load("run/last.pt", weights_only=True)
    assert saved["state"]["step"] == 2
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_images_that_changed_during_a_pause_stop_the_run_by_name(
    save_images: Callable[..., Path], make_store: Callable[..., Path], small_options: Options
) -> None:
    images = save_images([(64, 64), (50, 64), (64, 20)])
    store = make_store(images)
    interrupted_at(1, "train", small_options(store, out="run"))
    for file in images.iterdir():
        data = bytearray(file.read_bytes())
        data[-16] ^= 1
        file.write_bytes(data)
    with pytest.raises(ImageError, match="changed since precompute"):
        distill(small_options(store, out="run"))
