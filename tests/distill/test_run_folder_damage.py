"""A flipped bit in any file of a run is an error, makes an older file take its place, or changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from flips import flipped

from mobilesam.distill import (
    DistillConfig,
    DistillError,
    DistillInterrupted,
    Progress,
    Run,
    StopFlag,
    distill,
)
from mobilesam.distill.students.student_file import load_tensors

Options = Callable[..., DistillConfig]
CLOCKS = ("images_per_second", "data_wait_share", "seconds", "finished", "run")


pytestmark = pytest.mark.usefixtures("small")


def content(run: Path) -> tuple[list[dict], list[dict[str, bytes]]]:
    """Metrics and tensors of a run, without clocks."""
    lines = [{k: v for k, v in line.items() if k not in CLOCKS} for line in Run.open(run).history()]
    files = [load_tensors(run / name) for name in ("student.safetensors", "mean_embedding.safetensors")]
    return lines, [{key: value.numpy().tobytes() for key, value in tensors.items()} for tensors in files]


def stop_at(step: int, config: DistillConfig) -> None:
    flag = StopFlag()

    def watch(progress: Progress) -> None:
        if progress.step == step and progress.phase == "train":
            flag.set(signal.SIGTERM)

    with pytest.raises(DistillInterrupted):
        distill(config, progress=watch, stop=flag)


@pytest.fixture
def config(store: Path, options: Options) -> DistillConfig:
    return options(store, student="small", out="run", epochs=3)


@pytest.fixture(scope="module")
def runs(store: Path, options: Options, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run, and one that was stopped in its second epoch and holds both checkpoints."""
    made = {}
    before = Path.cwd()
    for name in ("finished", "half"):
        made[name] = tmp_path_factory.mktemp(name) / "run"
        os.chdir(made[name].parent)
        try:
            config = options(store, student="small", out="run", epochs=3)
            distill(config) if name == "finished" else stop_at(5, config)
        finally:
            os.chdir(before)
    return made


FILES = [
    "config.json", "split.json", "metrics.jsonl", "last.pt", "previous.pt", "student.safetensors",
    "mean_embedding.safetensors", "sam_head.safetensors", "run.lock", "events.out.tfevents.*",
]  # fmt: skip


def flip_in(run: Path, name: str, share: float) -> None:
    (path,) = run.glob(name)
    data = path.read_bytes()
    path.write_bytes(flipped(data, int(8 * len(data) * share)))


def rerun(run: Path, config: DistillConfig, wanted: Path) -> str:
    """Run distill again: "same" if the run then equals the wanted one, or the error."""
    shutil.rmtree("run", ignore_errors=True)
    run.rename("run")
    try:
        distill(config)
    except DistillError as error:
        return str(error)
    assert content(Path("run")) == content(wanted)
    assert Run.open("run").read_head()
    assert not list(Path("run").glob("*.partial"))
    return "same"


def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_a_resumed_run_is_an_error_or_changes_nothing(
    runs: dict[str, Path], tmp_path: Path, config: DistillConfig, name: str, share: float
) -> None:
    run = copied(runs["half"], tmp_path)
    flip_in(run, name, share)
    outcome = rerun(run, config, runs["finished"])
    if name in ("config.json", "metrics.jsonl"):
        assert name in outcome
        assert "--restart" in outcome
    else:
        assert outcome == "same"


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_a_finished_run_is_an_error_or_changes_nothing(
    runs: dict[str, Path], tmp_path: Path, config: DistillConfig, name: str
) -> None:
    run = copied(runs["finished"], tmp_path)
    if name == "previous.pt":
        assert not (run / name).exists()
        return
    flip_in(run, name, 0.5)
    if name == "metrics.jsonl":
        with pytest.raises(DistillError, match=r"metrics\.jsonl is damaged in line \d+"):
            Run.open(run).history()
        return
    outcome = rerun(run, config, runs["finished"])
    assert (name in outcome) if name == "config.json" else outcome == "same"


def test_a_damaged_last_line_is_no_result_and_written_again(
    runs: dict[str, Path], tmp_path: Path, config: DistillConfig
) -> None:
    run = copied(runs["finished"], tmp_path)
    data = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(flipped(data, 8 * (len(data) - 200)))
    assert Run.open(run).result() is None
    assert rerun(run, config, runs["finished"]) == "same"


@pytest.mark.parametrize("how", ["deleted", "empty", "half", "zeros"])
@pytest.mark.parametrize("both", [False, True])
def test_a_lost_or_cut_checkpoint_falls_back_and_two_are_an_error(
    runs: dict[str, Path], tmp_path: Path, config: DistillConfig, how: str, both: bool
) -> None:
    run = copied(runs["half"], tmp_path)
    for name in ("last.pt", "previous.pt")[: 1 + both]:
        data = (run / name).read_bytes()
        if how == "deleted":
            (run / name).unlink()
        else:
            damaged = {"empty": b"", "half": data[: len(data) // 2], "zeros": bytes(len(data))}[how]
            (run / name).write_bytes(damaged)
    outcome = rerun(run, config, runs["finished"])
    assert outcome == "same" if not both else "--restart" in outcome


@pytest.mark.parametrize("name", ["student.safetensors", "mean_embedding.safetensors"])
def test_a_file_of_another_run_is_refused_by_name(
    runs: dict[str, Path], tmp_path: Path, store: Path, options: Options, name: str
) -> None:
    distill(options(store, student="small", out="other", seed=1, epochs=3))
    run = copied(runs["finished"], tmp_path)
    shutil.copy(Path("other") / name, run / name)
    opened = Run.open(run)
    with pytest.raises(DistillError, match=f"{name} is another run's"):
        opened.student() if name == "student.safetensors" else opened.mean_embedding()


def test_a_split_of_another_run_is_refused_by_name(
    runs: dict[str, Path], tmp_path: Path, store: Path, options: Options
) -> None:
    distill(options(store, student="small", out="other", val_fraction=0.6, epochs=1))
    run = copied(runs["finished"], tmp_path)
    shutil.copy("other/split.json", run / "split.json")
    with pytest.raises(DistillError, match=r"split\.json is another run's"):
        Run.open(run)


@pytest.mark.parametrize("changed", [False, True])
def test_a_run_that_never_saved_anything_does_not_block_another(
    save_images: Callable[..., Path], make_store: Callable[..., Path], options: Options, changed: bool
) -> None:
    images = save_images([(64, 64), (50, 64), (64, 20)])
    config = options(make_store(images), student="small", out="run")
    originals = {file: file.read_bytes() for file in images.iterdir()}
    for file, data in originals.items():
        file.write_bytes(flipped(data, 8 * len(data) - 100))
    with pytest.raises(Exception, match=r"\.png changed since precompute") as caught:
        distill(config)
    assert len(str(caught.value).splitlines()) == 2
    for file, data in originals.items():
        file.write_bytes(data)
    again = options(config.store, student="small", out="run", lr=2e-3) if changed else config
    distill(again)
    assert Run.open("run").description.identity["lr"] == again.resolved_recipe.lr
    assert not list(Path("run").glob("*.partial"))
