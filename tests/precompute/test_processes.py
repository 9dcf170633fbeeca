"""Runs as users start them: real worker processes, signals, dask's own commands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mobilesam.store import EmbeddingStore

DASK = Path(sys.executable).with_name("dask")


def _command(photos: Path, out: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "mobilesam", "precompute", "--images", str(photos), "--out", str(out),
        "--teacher", "vit_nano", "--image-size", "64", "--json", *options,
    ]  # fmt: skip


def _run(photos: Path, out: Path, *options: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    done = subprocess.run(
        _command(photos, out, *options),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | (env or {}),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _shard_files(path: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_ino, file.read_bytes()) for file in (path / "embeddings").glob("c.*")}


def _contents(path: Path) -> dict[str, bytes]:
    return {name: data for name, (_, data) in _shard_files(path).items()}


def _committed(path: Path) -> int:
    try:
        with EmbeddingStore.open(path) as store:
            return len(store.committed_shards())
    except Exception:  # noqa: BLE001 - it is being made
        return 0


def _preload(folder: Path, text: str) -> dict[str, str]:
    """Environment in which dask's workers run some code first."""
    script = folder / "preload.py"
    script.write_text(text)
    return {"DASK_DISTRIBUTED__WORKER__PRELOAD": str(script)}


# dask runs a preload more than once in a process: what these wrap is the original every time.
SLOW_IMAGES = """
import time
import mobilesam.precompute.decoding as decoding
from mobilesam.sam import load_image
def slowly(data, image_size):
    time.sleep(0.4)
    return load_image(data, image_size)
decoding.load_image = slowly
"""


@pytest.fixture(scope="module")
def undisturbed(shared_photos: Path) -> dict[str, bytes]:
    """The shard files of a run of one local worker, a shard for each picture."""
    out = shared_photos.with_name("undisturbed.zarr")
    result = _run(shared_photos, out, "--shard-size", "1")
    assert (result["images"], result["done"], result["done_before"]) == (7, 7, 0)
    assert (result["audit"]["rows"], result["out_of_tolerance"]) == (2, False)
    return _contents(out)


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)],
)
def test_an_interrupted_run_goes_on_where_it_was(
    shared_photos: Path, undisturbed: dict[str, bytes], tmp_path: Path, signum: int, code: int
) -> None:
    photos, options = shared_photos, ("--shard-size", "1")
    out = tmp_path / "store.zarr"
    process = subprocess.Popen(
        _command(photos, out, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | _preload(tmp_path, SLOW_IMAGES),
        start_new_session=True,
    )
    while _committed(out) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    # As a terminal does it: the whole process group is told, workers included.
    os.killpg(process.pid, signum)
    output, errors = process.communicate()
    assert process.returncode == code, errors
    assert output == ""
    match = re.search(r"interrupted: (\d+) of 7 images are committed; run the same command to go on", errors)
    assert match, errors
    assert "Traceback" not in errors
    before = _shard_files(out)
    done_before = int(match[1])
    assert 2 <= done_before < 7
    result = _run(photos, out, *options)
    assert (result["done"], result["done_before"], result["failed"]) == (7, done_before, 0)
    after = _shard_files(out)
    with EmbeddingStore.open(out) as store:
        assert store.counts().done == 7
    untouched = [name for name in before if after[name][0] == before[name][0]]
    assert len(untouched) == done_before
    assert _contents(out) == undisturbed
    assert not list(out.rglob("*.partial"))


def test_two_workers_share_a_run_and_dasks_report_shows_its_phases(
    shared_photos: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    report = tmp_path / "dask.html"
    out = tmp_path / "store.zarr"
    _run(shared_photos, out, "--shard-size", "1", "--workers", "2", "--performance-report", str(report))
    assert _contents(out) == undisturbed
    page = report.read_text()
    assert "Task Stream" in page
    assert len(set(re.findall(r"tcp://127\.0\.0\.1:\d+-\d+", page))) >= 2, "threads of two workers drew bars"
    for phase in ("disk-read", "disk-write", "compute"):
        assert f"{phase} time" in page


def test_dasks_own_scheduler_and_worker_commands_do(
    shared_photos: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    with _dask(
        "scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"
    ) as lines:
        address = next(match[0] for line in lines if (match := re.search(r"tcp://127\.0\.0\.1:\d+", line)))
        with _dask("worker", address, "--nworkers", "2", "--nthreads", "2", "--host", "127.0.0.1"):
            out = tmp_path / "store.zarr"
            result = _run(shared_photos, out, "--scheduler", address, "--shard-size", "1")
    assert (result["done"], result["failed"]) == (7, 0)
    assert _contents(out) == undisturbed


@contextmanager
def _dask(*arguments: str) -> Iterator[Iterator[str]]:
    """One of dask's commands while the context lasts; its lines of output."""
    process = subprocess.Popen([str(DASK), *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield iter(process.stderr.readline, "")
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


KILLER = """
import os
import mobilesam.precompute.decoding as decoding
from mobilesam.sam import load_image
def deadly(data, image_size):
    if data.endswith(b"KILL"):
        os.abort()
    return load_image(data, image_size)
decoding.load_image = deadly
"""


@pytest.mark.long
def test_an_image_that_kills_workers_is_found_and_the_job_goes_on(photos: Path, tmp_path: Path) -> None:
    _run(photos, tmp_path / "whole.zarr", "--shard-size", "4")
    with (photos / "2-coffee.png").open("ab") as file:
        file.write(b"KILL")
    out = tmp_path / "store.zarr"
    result = _run(photos, out, "--shard-size", "4", env=_preload(tmp_path, KILLER))
    assert (result["done"], result["failed"]) == (6, 1)
    with EmbeddingStore.open(out) as store, EmbeddingStore.open(tmp_path / "whole.zarr") as whole:
        (record,) = store.records("failed")
        assert record.key == "2-coffee.png"
        assert record.reason == "a worker process died each time it processed this image"
        rows = [record.row for record in store.records("done")]
        assert store.read(rows).values.tobytes() == whole.read(rows).values.tobytes()


HANGING = """
import ctypes
import time
import mobilesam.precompute.decoding as decoding
from mobilesam.sam import load_image
def hanging(data, image_size):
    while data.endswith(b"HANG"):
        {how}
    return load_image(data, image_size)
decoding.load_image = hanging
"""


def _hang(photo: Path) -> None:
    with photo.open("ab") as file:
        file.write(b"HANG")


def _processes(marker: str) -> list[int]:
    """Processes that have `marker` in their environment, and are no zombies."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and marker.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def _others_are_whole(out: Path, undisturbed: dict[str, bytes], failed: str, reason: str) -> None:
    """Every image but one is stored as in the undisturbed run, in shards of one image."""
    with EmbeddingStore.open(out) as store:
        (record,) = store.records("failed")
        assert (record.key, record.reason) == (failed, reason)
        assert store.counts().done == 6
    contents = _contents(out)
    del contents[f"c.{record.row}.0.0.0"]
    assert contents.items() <= undisturbed.items()
    assert not list(out.rglob("*.partial"))


@pytest.mark.long
def test_an_image_whose_decoding_never_ends_fails_and_holds_up_nothing(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    _hang(photos / "2-coffee.png")
    out = tmp_path / "store.zarr"
    env = _preload(tmp_path, HANGING.format(how="time.sleep(3600)")) | {"MOBILESAM_TEST": str(tmp_path)}
    result = _run(photos, out, "--shard-size", "1", "--image-timeout", "8", env=env)
    assert (result["done"], result["failed"]) == (6, 1)
    reason = "reading and decoding it took longer than 8 s (--image-timeout)"
    _others_are_whole(out, undisturbed, "2-coffee.png", reason)
    assert _processes(f"MOBILESAM_TEST={tmp_path}") == []


@pytest.mark.long
def test_an_image_that_hangs_with_pythons_lock_held_is_found_and_the_job_goes_on(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    _hang(photos / "2-coffee.png")
    out = tmp_path / "store.zarr"
    env = _preload(tmp_path, HANGING.format(how="ctypes.PyDLL(None).pause()"))
    env |= {"MOBILESAM_TEST": str(tmp_path)}
    # Workers are given up after ten seconds more.
    result = _run(photos, out, "--shard-size", "1", "--image-timeout", "8", env=env)
    assert (result["done"], result["failed"]) == (6, 1)
    reason = "a worker process died each time it processed this image"
    _others_are_whole(out, undisturbed, "2-coffee.png", reason)
    assert _processes(f"MOBILESAM_TEST={tmp_path}") == []


HANGING_TEACHER = """
import time
import mobilesam.precompute.worker as worker
if not hasattr(worker, "embed_as_it_was"):
    worker.embed_as_it_was = worker._embed
def hanging(teacher, batch):
    while batch.images[0].image.key == "2-coffee.png":
        time.sleep(3600)
    return worker.embed_as_it_was(teacher, batch)
worker._embed = hanging
"""

IMPATIENT = """
import sys
from mobilesam.precompute import sizing
sizing.FIRST_BATCH_SECONDS = sizing.IMAGE_SECONDS = sizing.LEAST_BATCH_SECONDS = 10.0
if __name__ == "__main__":
    from mobilesam.cli import main
    main(sys.argv[1:])
"""


@pytest.mark.long
def test_an_image_that_hangs_in_the_teacher_is_found_and_the_job_goes_on(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out, script = tmp_path / "store.zarr", tmp_path / "impatient.py"
    script.write_text(IMPATIENT)
    command = _command(photos, out, "--shard-size", "1")
    done = subprocess.run(
        [sys.executable, str(script), *command[3:]],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | _preload(tmp_path, HANGING_TEACHER),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"worker tcp://\S+ ends: a batch hung in the teacher for \d+ s", done.stderr), (
        done.stderr
    )
    reason = "a worker process died each time it processed this image"
    _others_are_whole(out, undisturbed, "2-coffee.png", reason)


@pytest.mark.parametrize(
    "how", ["time.sleep(3600)", pytest.param("ctypes.PyDLL(None).pause()", marks=pytest.mark.long)]
)
def test_workers_end_with_a_coordinator_that_is_killed_and_its_scratch_goes_with_the_next(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path, how: str
) -> None:
    _hang(photos / "2-coffee.png")
    out, temporary = tmp_path / "store.zarr", tmp_path / "tmp"
    temporary.mkdir()
    env = {"MOBILESAM_TEST": str(tmp_path), "TMPDIR": str(temporary)}
    process = subprocess.Popen(
        _command(photos, out, "--shard-size", "1"),
        stderr=subprocess.DEVNULL,
        env=os.environ | _preload(tmp_path, HANGING.format(how=how)) | env,
    )
    while _committed(out) < 1:
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)  # by now a worker is at the image that hangs
    assert len(_processes(f"MOBILESAM_TEST={tmp_path}")) > 1
    process.kill()
    process.wait()
    while _processes(f"MOBILESAM_TEST={tmp_path}"):
        time.sleep(0.1)  # an orphan hangs this test
    assert len(list(temporary.glob("mobilesam-*"))) == 1
    data = (photos / "2-coffee.png").read_bytes().removesuffix(b"HANG")
    (photos / "2-coffee.png").write_bytes(data)
    result = _run(photos, out, "--shard-size", "1", env=env)
    assert (result["done"], result["failed"]) == (7, 0)
    assert _contents(out) == undisturbed
    assert not list(temporary.glob("*mobilesam-*"))
