"""A run's folder that is locked, refused, set aside or no run at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mobilesam.distill import DistillConfig, DistillError, Run, distill
from mobilesam.distill.run_folder import run_lock

Options = Callable[..., DistillConfig]


@pytest.fixture
def run(store: Path, options: Options, small: str) -> Run:
    """A finished run in runs/."""
    return Run.open(distill(options(store, student=small))["run"])


def test_a_second_trainer_on_the_same_run_is_refused(run: Run, store: Path, options: Options) -> None:
    with run_lock(run.path), pytest.raises(DistillError, match=f"process {os.getpid()}"):
        distill(options(store, student="small"))


def test_another_configuration_in_the_same_folder_is_refused_with_the_difference(
    run: Run, store: Path, options: Options
) -> None:
    with pytest.raises(DistillError, match=r"lr: 0\.\d+ then, 0\.5 now"):
        distill(options(store, student="small", lr=0.5, out=run.path))


def test_other_data_under_the_same_folder_is_refused(
    run: Run, images: Path, make_store: Callable[..., Path], options: Options
) -> None:
    with pytest.raises(DistillError, match="store_id"):
        distill(options(make_store(images), student="small", out=run.path))


def test_restart_keeps_the_old_run_whole_beside_the_new_one(
    store: Path, options: Options, small: str
) -> None:
    options = partial(options, student=small)
    first = Path(distill(options(store, epochs=1, out="here"))["run"])
    weights = (first / "student.safetensors").read_bytes()
    again = Path(distill(options(store, epochs=1, out="here", seed=5, restart=True))["run"])
    assert again == first
    assert (first / "student.safetensors").read_bytes() != weights
    assert (first.with_name("here.old-1") / "student.safetensors").read_bytes() == weights
    assert Path("runs/latest").resolve() == first


def test_a_folder_that_is_no_run_is_left_alone(store: Path, options: Options) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("important")
    with pytest.raises(DistillError, match="holds 1 other"):
        distill(options(store, out="mine", restart=True))
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("damage", ["nothing", "no config", "half a split"])
def test_what_is_no_run_cannot_be_opened_as_one(tmp_path: Path, damage: str) -> None:
    if damage != "nothing":
        (tmp_path / "r").mkdir()
    if damage == "half a split":
        (tmp_path / "r/config.json").write_text("{}")
        (tmp_path / "r/split.json").write_text('{"train": [1')
    with pytest.raises(DistillError, match="run"):
        Run.open(tmp_path / "r")
