"""Runs as users start them: real worker processes, signals, dask's own commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from precompute_command import command_of, committed, contents, preload, run_command, shard_files

from mobilesam.store import EmbeddingStore

DASK = Path(sys.executable).with_name("dask")


# After three images the worker waits for a file. dask runs a preload more than once in a process: what these wrap is
# the original every time.
WAITING = """
import itertools, pathlib, time
import mobilesam.precompute.decode as decode
from mobilesam.sam import load_image
count = itertools.count()
def waiting(data, image_size):
    if next(count) >= 3:
        while not pathlib.Path({gate!r}).exists():
            time.sleep(0.02)
    return load_image(data, image_size)
decode.load_image = waiting
"""


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)],
)
def test_an_interrupted_run_resumes_where_it_was(
    shared_photos: Path, undisturbed: dict[str, bytes], tmp_path: Path, signum: int, code: int
) -> None:
    photos, options = shared_photos, ("--shard-size", "1")
    out, gate = tmp_path / "store.zarr", tmp_path / "gate"
    process = subprocess.Popen(
        command_of(photos, out, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | preload(tmp_path, WAITING.format(gate=str(gate))),
        start_new_session=True,
    )
    while committed(out) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    # As a terminal does: the signal goes to the whole process group, workers included.
    os.killpg(process.pid, signum)
    gate.touch()
    output, errors = process.communicate()
    assert process.returncode == code, errors
    assert output == ""
    match = re.search(r"interrupted: (\d+) of 7 images are committed; run the same command to resume", errors)
    assert match, errors
    assert "Traceback" not in errors
    before = shard_files(out)
    done_before = int(match[1])
    assert 2 <= done_before < 7
    result = run_command(photos, out, *options)
    assert (result["done"], result["done_before"], result["failed"]) == (7, done_before, 0)
    after = shard_files(out)
    with EmbeddingStore.open(out) as store:
        assert store.manifest.counts().done == 7
    untouched = [name for name in before if after[name][0] == before[name][0]]
    assert len(untouched) == done_before
    assert contents(out) == undisturbed
    assert not list(out.rglob("*.partial"))


def test_two_workers_share_a_run_and_dasks_report_shows_its_phases(
    shared_photos: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    report = tmp_path / "dask.html"
    out = tmp_path / "store.zarr"
    run_command(
        shared_photos, out, "--shard-size", "1", "--workers", "2", "--performance-report", str(report)
    )
    assert contents(out) == undisturbed
    page = report.read_text()
    assert "Task Stream" in page
    assert len(set(re.findall(r"tcp://127\.0\.0\.1:\d+-\d+", page))) >= 2, "threads of two workers drew bars"
    for phase in ("disk-read", "disk-write", "compute"):
        assert f"{phase} time" in page


def test_a_run_works_on_dasks_own_scheduler_and_worker_commands(
    shared_photos: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    with _dask(
        "scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"
    ) as lines:
        address = next(match[0] for line in lines if (match := re.search(r"tcp://127\.0\.0\.1:\d+", line)))
        with _dask("worker", address, "--nworkers", "2", "--nthreads", "2", "--host", "127.0.0.1"):
            out = tmp_path / "store.zarr"
            result = run_command(shared_photos, out, "--scheduler", address, "--shard-size", "1")
    assert (result["done"], result["failed"]) == (7, 0)
    assert contents(out) == undisturbed


@contextmanager
def _dask(*arguments: str) -> Iterator[Iterator[str]]:
    """Run one of dask's commands in the context; yield its lines of output."""
    process = subprocess.Popen([str(DASK), *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield iter(process.stderr.readline, "")
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


KILLER = """
import os
import mobilesam.precompute.decode as decode
from mobilesam.sam import load_image
def deadly(data, image_size):
    if data.endswith(b"KILL"):
        os.abort()
    return load_image(data, image_size)
decode.load_image = deadly
"""


@pytest.mark.long
def test_an_image_that_kills_workers_is_found_and_the_job_goes_on(photos: Path, tmp_path: Path) -> None:
    run_command(photos, tmp_path / "whole.zarr", "--shard-size", "4")
    with (photos / "2-coffee.png").open("ab") as file:
        file.write(b"KILL")
    out = tmp_path / "store.zarr"
    result = run_command(photos, out, "--shard-size", "4", env=preload(tmp_path, KILLER))
    assert (result["done"], result["failed"]) == (6, 1)
    with EmbeddingStore.open(out) as store, EmbeddingStore.open(tmp_path / "whole.zarr") as whole:
        (record,) = store.manifest.records("failed")
        assert record.key == "2-coffee.png"
        assert record.reason == "a worker process died each time it processed this image"
        rows = [record.row for record in store.manifest.records("done")]
        assert store.read(rows).values.tobytes() == whole.read(rows).values.tobytes()
