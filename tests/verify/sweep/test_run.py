"""Sweeps that really train: the world's six photos at 128 pixels."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mobilesam.cli import main
from mobilesam.distill import DistillConfig, DistillInterrupted, Progress, Run
from mobilesam.store import Audit, EmbeddingStore, StoreError
from mobilesam.verify import SweepConfig, VerifyConfig, VerifyError, sweep, verify

# Four photos to train on.
BASE = {"val_fraction": 0.4, "device": "cpu", "precision": "float32"}


def config(store: Path, out: Path, **axes: tuple[Any, ...]) -> SweepConfig:
    given = {"epochs": (1,), "batch_size": (4,), **axes}
    return SweepConfig(out=out, base=DistillConfig(store=store, **BASE), axes=given, points=2)


@pytest.fixture(scope="module")
def finished(finished_world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Decoupled and its decoder finetuned, one step each; whatever was messages."""
    out = tmp_path_factory.mktemp("sweeps") / "a"
    messages: list[str] = []
    asked = config(finished_world / "store.zarr", out, objective=("decoupled", "decoder"))
    result = sweep(asked, message=messages.append)
    return {"config": asked, "result": result, "messages": messages, "out": out}


@pytest.fixture
def again(finished: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the finished sweep's folder, to go on with or to damage."""
    return Path(shutil.copytree(finished["out"], tmp_path / "a"))


def _store(finished: dict[str, Any]) -> Path:
    return Path(finished["config"].base.store)


def _trained(result: dict[str, Any]) -> dict[str, bytes]:
    return {
        outcome["name"]: (Path(outcome["run"]) / "metrics.jsonl").read_bytes() for outcome in result["runs"]
    }


def test_each_run_is_what_distill_leaves_and_what_verify_says_of_it(finished: dict[str, Any]) -> None:
    runs = finished["result"]["runs"]
    assert [run["options"]["objective"] for run in runs] == ["decoupled", "decoder"]
    for outcome in runs:
        run = Run.open(outcome["run"])
        result = run.result()
        assert result is not None
        assert (
            (outcome["steps"], outcome["seconds"])
            == (result["steps"], result["seconds"])
            == (1, result["seconds"])
        )
        said = verify(VerifyConfig(student=run.path, points=2, device="cpu"))
        assert outcome["val"]["miou"] == said["miou"]
        assert outcome["val"]["skill_valid"] == said["skill_valid"]
        assert outcome["curve"][-1]["skill_valid"] == pytest.approx(said["skill_valid"], rel=1e-5)


def test_the_decoder_run_has_the_decoupled_runs_encoder(finished: dict[str, Any]) -> None:
    decoupled, decoder = finished["result"]["runs"]
    assert decoder["val"]["mse"] == pytest.approx(decoupled["val"]["mse"], rel=1e-6)
    assert decoder["val"]["miou"] != decoupled["val"]["miou"]


def test_results_tables_and_a_page_are_left(finished: dict[str, Any]) -> None:
    out = finished["out"]
    assert json.loads((out / "results.json").read_text())["runs"] == finished["result"]["runs"]
    tables = (out / "tables.md").read_text()
    assert "**Batch, epochs and iterations**" in tables
    assert "**Ways to distil**" in tables
    html = (out / "report.html").read_text()
    assert html.count("<svg") == 3
    for outcome in finished["result"]["runs"]:
        assert outcome["name"] in html
        assert f"{outcome['val']['miou']:.4f}" in html


def test_runs_latest_is_left_to_distill(finished: dict[str, Any]) -> None:
    assert not list(finished["out"].parent.rglob("latest"))


def test_a_rerun_trains_nothing_and_a_wider_grid_only_what_is_new(
    finished: dict[str, Any], again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: (path / "metrics.jsonl").read_bytes() for path in (again / "runs").iterdir()}
    asked = config(_store(finished), again, objective=("decoupled", "decoder"))
    same = sweep(asked)
    assert _trained(same) == before
    assert [run["val"] for run in same["runs"]] == [run["val"] for run in finished["result"]["runs"]]
    wider = sweep(config(_store(finished), again, batch_size=(4, 2)))
    assert [run["steps"] for run in wider["runs"]] == [1, 2]
    assert _trained(wider).items() >= {next(iter(_trained(wider))): before[wider["runs"][0]["name"]]}.items()


def test_results_that_are_damaged_are_rebuilt(finished: dict[str, Any], again: Path) -> None:
    (again / "results.json").write_text('{"format": 1, "runs": [')
    result = sweep(config(_store(finished), again))
    assert result["runs"][0]["val"] == finished["result"]["runs"][0]["val"]
    assert len(json.loads((again / "results.json").read_text())["runs"]) == 1


def test_a_run_that_fails_is_named_and_takes_along_only_what_begins_with_it(
    finished: dict[str, Any], again: Path
) -> None:
    decoupled = Path(finished["result"]["runs"][0]["run"]).name
    (again / "runs" / decoupled / "config.json").write_text("{}")
    messages: list[str] = []
    asked = config(_store(finished), again, objective=("decoupled", "decoder", "semi_coupled"), objects=(2,))
    result = sweep(asked, message=messages.append)
    assert ["error" in run for run in result["runs"]] == [True, False, True]
    assert result["failed"] == 2
    # Earlier numbers stay; the decoder run of this sweep is another one, with other objects.
    assert [run["status"] for run in result["runs"]] == ["done", "done", "failed"]
    assert result["runs"][0]["val"] == finished["result"]["runs"][0]["val"]
    assert any(line.endswith("its earlier numbers are kept") for line in messages)
    assert [run["options"]["objective"] for run in result["runs"]] == ["decoupled", "semi_coupled", "decoder"]
    assert "config.json is damaged" in result["runs"][0]["error"]
    assert f"{decoupled}, which it starts from, failed" in result["runs"][2]["error"]
    assert any(line.startswith(f"FAILED  {decoupled}") for line in messages)
    assert "2 runs failed" in (again / "report.html").read_text()


def test_a_signal_stops_the_sweep_and_a_rerun_finishes_with_the_same_student(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    asked = config(_store(finished), tmp_path / "b", batch_size=(4, 2))

    def send(progress: Progress) -> None:
        if progress.steps == 2 and progress.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(DistillInterrupted) as stopped:
        sweep(asked, progress=send)
    assert stopped.value.signum == signal.SIGTERM
    assert len(json.loads((tmp_path / "b" / "results.json").read_text())["runs"]) == 1
    gone_on = sweep(asked)
    unbroken = sweep(config(_store(finished), tmp_path / "c", batch_size=(2,)))
    assert gone_on["runs"][1]["val"]["mse"] == unbroken["runs"][0]["val"]["mse"]


def test_students_are_verified_on_a_test_store_too(finished: dict[str, Any], again: Path) -> None:
    store = _store(finished)
    asked = SweepConfig(
        out=again,
        base=DistillConfig(store=store, **BASE),
        axes={"epochs": (1,), "batch_size": (4,)},
        points=2,
        test_store=store,
    )
    (outcome,) = sweep(asked)["runs"]
    assert outcome["test"]["images"] == 6
    assert f"{outcome['test']['miou']:.4f}" in (again / "tables.md").read_text()


def test_a_test_store_that_holds_something_else_is_measured_again(
    finished: dict[str, Any], again: Path, plain_store: Callable[..., Path], tmp_path: Path
) -> None:
    first = plain_store(tmp_path / "first", seed=3)
    asked = dataclasses.replace(config(_store(finished), again), test_store=first)
    (before,) = sweep(asked)["runs"]
    assert sweep(asked)["runs"] == [before]
    shutil.rmtree(tmp_path / "first")
    plain_store(tmp_path / "first", seed=4)
    (after,) = sweep(asked)["runs"]
    assert after["judged"] != before["judged"]
    assert after["test"]["mse"] != before["test"]["mse"]
    assert after["val"] == before["val"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_sha256": "1" * 64}, "its checkpoint is 1111"),
        ({"teacher": "vit_b"}, "its teacher is vit_b, not"),
        ({"image_root": "/nowhere"}, "are not at /nowhere"),
        ({"head": b"no head"}, "is not a SAM head"),
    ],
)
def test_a_test_store_that_does_not_fit_is_refused_before_anything_is_trained(
    finished: dict[str, Any],
    plain_store: Callable[..., Path],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    other = plain_store(tmp_path / "other", seed=3, **changes)
    asked = dataclasses.replace(config(_store(finished), tmp_path / "b"), test_store=other)
    with pytest.raises((VerifyError, StoreError), match=message):
        sweep(asked)
    assert not (tmp_path / "b").exists()


def test_a_store_whose_embeddings_are_not_the_teachers_is_refused(
    finished: dict[str, Any], plain_store: Callable[..., Path], tmp_path: Path
) -> None:
    other = plain_store(tmp_path / "other", seed=3)
    with EmbeddingStore.open(other, writable=True) as store:
        store.record_audits([Audit(row=1, cosine=0.4, relative_mse=1.2)])
    asked = dataclasses.replace(config(_store(finished), tmp_path / "b"), test_store=other)
    with pytest.raises(VerifyError, match=r"other/store.zarr: the store's audit: cosine 0.4"):
        sweep(asked)


def test_tables_alone_are_a_sweeps_folder(finished: dict[str, Any], again: Path) -> None:
    (again / "results.json").unlink()
    result = sweep(config(_store(finished), again))
    assert result["runs"][0]["val"] == finished["result"]["runs"][0]["val"]


def test_a_run_that_needs_restart_fails_with_a_sweeps_mend(finished: dict[str, Any], again: Path) -> None:
    (run,) = (again / "runs").glob("*-decoupled-*")
    (run / "config.json").write_text("{}")
    (again / "results.json").unlink()
    (outcome,) = sweep(config(_store(finished), again))["runs"]
    assert outcome["status"] == "failed"
    assert outcome["error"].endswith(f"in a sweep: move {run} away and run the same command again")
    shutil.move(run, again.parent)
    (outcome,) = sweep(config(_store(finished), again))["runs"]
    assert outcome["status"] == "done"


def test_a_folder_that_holds_something_else_is_refused(finished: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(VerifyError, match="holds 1 other file and no sweep"):
        sweep(config(_store(finished), tmp_path))
    with pytest.raises(VerifyError, match="is a file"):
        sweep(config(_store(finished), tmp_path / "letters.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


@pytest.fixture
def command(finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    options = ["--store", str(_store(finished)), "--val-fraction", "0.4", "--device", "cpu", "--points", "2"]
    options += ["--precision", "float32", "--epochs", "1", "--batch-size", "4"]

    def run(*more: object) -> Any:
        return CliRunner().invoke(main, ["sweep", *options, *map(str, more)])

    return run


def test_the_command_prints_the_tables_or_one_json_object(again: Path, command: Callable[..., Any]) -> None:
    text = command("--out", again, "--objective", "decoupled,decoder")
    assert text.exit_code == 0, text.output
    assert "Ways to distil" in text.stdout
    result = json.loads(command("--out", again, "--json").stdout)
    assert result["failed"] == 0
    assert result["runs"][0]["val"]["miou"] is not None


def test_the_command_exits_1_when_a_run_failed(again: Path, command: Callable[..., Any]) -> None:
    for run in (again / "runs").glob("*-decoupled-*"):
        (run / "config.json").write_text("{}")
    failed = command("--out", again)
    assert failed.exit_code == 1, failed.output
    assert "FAILED  tiny_vit-decoupled-b4" in failed.stdout


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--batch-size", "4,x"], 2, "batch size must be int values"),
        (["--objective", "decoder"], 2, "add decoupled to the objectives"),
        (["--student", "resnet"], 2, "resnet"),
        (["--iterations", "5"], 2, "epochs and iterations"),
        (["--store", "nowhere.zarr"], 3, "nowhere.zarr"),
        (["--test-store", "nowhere.zarr"], 3, "nowhere.zarr"),
        (["--scheduler", "bogus"], 3, "no dask scheduler at bogus"),
    ],
)
def test_wrong_use_and_input_are_reported(
    command: Callable[..., Any], more: list[str], code: int, message: str, tmp_path: Path
) -> None:
    result = command(*more)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
