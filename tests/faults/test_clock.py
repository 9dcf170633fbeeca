"""System clock set wrong by years, between runs and during them: same bytes, nothing computed twice."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from faults.clock import build_shim, compiler, shifted
from faults.fault_log import FaultLog
from faults.fixtures import HANGING, Done, environment, mobilesam
from faults.recovery import Snapshot, living_processes, missing_rows, stray_files, wrong_reads
from faults.waiting_precompute import waiting_writer
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.fault,
    pytest.mark.skipif(compiler() is None, reason="no C compiler to build the clock's library with"),
]

PRECOMPUTE = (
    "--teacher",
    "vit_nano",
    "--image-size",
    "64",
    "--shard-size",
    "2",
    "--precision",
    "float32",
    "--json",
)
DISTILL = ("--epochs", "2", "--batch-size", "2", "--device", "cpu", "--precision", "float32", "--json")
YEARS = (40.0, -50.0)
"""Past the year 2038, and before 1980, which zip archives can't express."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shim(tmp_path_factory.mktemp("clock"))


def command(library: Path, cwd: Path, *arguments: str | Path, years: float = 0) -> Done:
    """Run a command under a shifted clock; assert that it succeeds and reports sensible times."""
    done = mobilesam(*arguments, cwd=cwd, env=environment(**shifted(library, years)))
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    check_times(done.json)
    return done


def check_times(result: dict[str, Any]) -> None:
    """Assert that no time, rate or share is negative or infinite."""
    for name in ("seconds", "images_per_second", "decode_seconds", "teacher_share", "data_wait_share"):
        value = result.get(name)
        assert value is None or (math.isfinite(value) and value >= 0), (name, value)
    assert result.get("seconds", 0) < HANGING
    assert (result.get("teacher_share") or 0) <= 2, result
    assert (result.get("data_wait_share") or 0) <= 1.01, result


def test_the_library_shifts_the_clock(library: Path) -> None:
    """Otherwise the tests of this file would test nothing."""
    code = "import time, datetime; print(datetime.datetime.now().year, time.time(), time.monotonic())"
    for years in YEARS:
        env = environment(**shifted(library, years))
        printed = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        ).stdout
        year, _, monotonic = printed.split()
        assert abs(int(year) - datetime.now().year - years) <= 1
        assert abs(float(monotonic) - time.monotonic()) < HANGING


def test_precompute_resumes_under_a_clock_changed_between_runs(
    run: Callable[..., dict[str, Any]], fault_log: FaultLog, library: Path, tmp_path: Path, pictures: Path
) -> None:
    """Forty years ahead, fifty behind, ahead again: each run resumes the one before."""
    run("undisturbed.zarr", shard_size=2, precision="float32")
    undisturbed = Snapshot.of(tmp_path / "undisturbed.zarr")
    store = tmp_path / "store.zarr"
    steps = [
        ("forwards", ("--limit", "4"), 4, 0, YEARS[0]),
        ("backwards", ("--extend",), 7, 4, YEARS[1]),
        ("forwards, nothing left", (), 7, 7, YEARS[0]),
    ]
    for number, (way, options, done, done_before, years) in enumerate(steps):
        found = command(
            library,
            tmp_path,
            "precompute",
            "--images",
            pictures,
            "--out",
            store,
            *PRECOMPUTE,
            *options,
            years=years,
        ).json
        assert (found["done"], found["done_before"], found["failed"]) == (done, done_before, 0)
        wrong = wrong_reads(store, undisturbed)
        lost = missing_rows(store, undisturbed) if done == 7 else []
        fault_log.record(
            call="clock", ordinal=number, file="store.zarr", phase=f"precompute, {way}", fired=True, lost=len(lost),
            wrong=len(wrong), role="coordinator",
        )  # fmt: skip
        assert (wrong, lost) == ([], [])
    assert stray_files(store, undisturbed) == []
    looked = command(library, tmp_path, "inspect", store, "--check", "--json", years=YEARS[1])
    assert looked.json["problems"] == []


@pytest.mark.parametrize("years", [-10.0, 10.0])
def test_a_clock_changed_during_precompute_loses_nothing(
    run: Callable[..., dict[str, Any]],
    fault_log: FaultLog,
    library: Path,
    tmp_path: Path,
    pictures: Path,
    years: float,
) -> None:
    """A jump of 20 years. Forwards, the run continues; backwards it ends with an error, since dask waits 20 years."""
    run("undisturbed.zarr", shard_size=1)
    undisturbed = Snapshot.of(tmp_path / "undisturbed.zarr")
    store, switch = tmp_path / "store.zarr", tmp_path / "switch"
    with waiting_writer(tmp_path, pictures, store, **shifted(library, years, switch)) as process:
        switch.touch()
        (tmp_path / "gate").touch()
        out, err = process.communicate(timeout=HANGING)
        sessions = [process.pid]
    wrong = wrong_reads(store, undisturbed)
    if years < 0:
        assert process.returncode == 0, err
        check_times(json.loads(out))
    else:
        assert process.returncode == 3, err
        assert b"the system clock was set back by 631,15" in err
    assert b"Traceback" not in err, err.decode()
    result = run(shard_size=1)
    # Only now: multiprocessing's resource tracker notices the coordinator's end with a delay.
    assert living_processes(sessions) == []
    wrong += wrong_reads(store, undisturbed)
    lost = missing_rows(store, undisturbed)
    fault_log.record(
        call="clock", ordinal=result["done_before"], file="store.zarr",
        phase=f"precompute at work, {'forwards' if years < 0 else 'backwards'}", fired=True, lost=len(lost),
        wrong=len(wrong), role="coordinator",
    )  # fmt: skip
    assert (wrong, lost) == ([], [])
    assert result["done_before"] >= 1
    assert stray_files(store, undisturbed) == []


def test_training_and_verify_give_the_same_results_under_any_clock(
    run: Callable[..., dict[str, Any]], fault_log: FaultLog, library: Path, tmp_path: Path
) -> None:
    """A trainer is stopped under one clock, resumed under another, and its student verified under a third."""
    run()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = command(library, tmp_path, "distill", "--out", whole, *DISTILL).json
    stop_early(library, tmp_path, broken, YEARS[0])
    command(library, tmp_path, "distill", "--out", broken, *DISTILL, years=YEARS[1])
    again = command(library, tmp_path, "distill", "--out", broken, *DISTILL, years=5.0).json
    same = again["val"] == expected["val"] and weights(broken) == weights(whole)
    fault_log.record(
        call="clock",
        ordinal=0,
        file="run",
        phase="distill",
        fired=True,
        lost=int(not same),
        wrong=0,
        role="trainer",
    )
    assert same, (again, expected)
    report = tmp_path / "report.html"
    judged = command(
        library,
        tmp_path,
        "verify",
        "--student",
        broken,
        "--report",
        report,
        "--json",
        years=YEARS[1],
    ).json
    plain = command(library, tmp_path, "verify", "--student", whole, "--json").json
    fault_log.record(
        call="clock", ordinal=0, file="report.html", phase="verify", fired=True, lost=0,
        wrong=int(judged["cosine"] != plain["cosine"]), role="verify",
    )  # fmt: skip
    assert judged["cosine"] == plain["cosine"]
    assert judged["mse"] == plain["mse"]
    lines = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        check_times(line)


def weights(folder: Path) -> dict[str, bytes]:
    return {
        name: value.numpy().tobytes() for name, value in load_file(folder / "student.safetensors").items()
    }


def stop_early(library: Path, cwd: Path, out: Path, years: float) -> None:
    """Start a training under a shifted clock and stop it once it has begun."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mobilesam", "distill", "--out", str(out), *DISTILL],
        cwd=cwd,
        env=environment(**shifted(library, years)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + HANGING
    while not list(out.glob("events.*")) and not list(out.rglob("events.*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=HANGING)
    assert process.returncode in (143, 0), err
