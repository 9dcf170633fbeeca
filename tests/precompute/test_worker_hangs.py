"""Images and teachers that hang for good, and workers whose coordinator was killed, in real worker processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from precompute_command import command_of, contents, preload, run_command

from mobilesam.precompute.worker import leaves_cuda_unusable
from mobilesam.store import EmbeddingStore

HANGING = """
import ctypes
import time
import mobilesam.precompute.decode as decode
from mobilesam.sam import load_image
def hanging(data, image_size):
    while data.endswith(b"HANG"):
        {how}
    return load_image(data, image_size)
decode.load_image = hanging
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
    """Assert that every image but one is stored as in the undisturbed run, in shards of one image."""
    with EmbeddingStore.open(out) as store:
        (record,) = store.manifest.records("failed")
        assert (record.key, record.reason) == (failed, reason)
        assert store.manifest.counts().done == 6
    stored = contents(out)
    del stored[f"c.{record.row}.0.0.0"]
    assert stored.items() <= undisturbed.items()
    assert not list(out.rglob("*.partial"))


@pytest.mark.long
def test_an_image_whose_decoding_never_ends_fails_and_holds_up_nothing(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    _hang(photos / "2-coffee.png")
    out = tmp_path / "store.zarr"
    env = preload(tmp_path, HANGING.format(how="time.sleep(3600)")) | {"MOBILESAM_TEST": str(tmp_path)}
    result = run_command(photos, out, "--shard-size", "1", "--image-timeout", "8", env=env)
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
    env = preload(tmp_path, HANGING.format(how="ctypes.PyDLL(None).pause()"))
    env |= {"MOBILESAM_TEST": str(tmp_path)}
    # Workers are given up after ten seconds more.
    result = run_command(photos, out, "--shard-size", "1", "--image-timeout", "8", env=env)
    assert (result["done"], result["failed"]) == (6, 1)
    reason = "a worker process died each time it processed this image"
    _others_are_whole(out, undisturbed, "2-coffee.png", reason)
    assert _processes(f"MOBILESAM_TEST={tmp_path}") == []


HANGING_TEACHER = """
import time
import mobilesam.precompute.shard_task as shard_task
if not hasattr(shard_task, "embed_as_it_was"):
    shard_task.embed_as_it_was = shard_task.embed
def hanging(teacher, batch):
    (loaded,) = batch.images
    while loaded.image.ref.key == "2-coffee.png" and loaded.decoded is not None:
        time.sleep(3600)
    return shard_task.embed_as_it_was(teacher, batch)
shard_task.embed = hanging
"""

IMPATIENT = """
import sys
from mobilesam.precompute import sizing
sizing.FIRST_BATCH_SECONDS = sizing.IMAGE_SECONDS = sizing.LEAST_BATCH_SECONDS = 10.0
sizing.SLOWER_THAN_SLOWEST = 2.0
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
    command = command_of(photos, out, "--shard-size", "1")
    done = subprocess.run(
        [sys.executable, str(script), *command[3:]],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | preload(tmp_path, HANGING_TEACHER),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"worker tcp://\S+ ends: a batch hung in the teacher for \d+ s", done.stderr), (
        done.stderr
    )
    reason = "a worker process died each time it processed this image"
    _others_are_whole(out, undisturbed, "2-coffee.png", reason)


def _started(photos: Path, out: Path, folder: Path, how: str) -> subprocess.Popen[bytes]:
    """Start a run in shards of one image, and return it once a worker is at an image that hangs."""
    _hang(photos / "2-coffee.png")
    mark, temporary = folder / "hanging", folder / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        command_of(photos, out, "--shard-size", "1"),
        stdout=subprocess.DEVNULL,
        stderr=(folder / "errors").open("wb"),
        env=os.environ
        | preload(folder, HANGING.format(how=f"open({str(mark)!r}, 'w').close(); {how}"))
        | {"MOBILESAM_TEST": str(folder), "TMPDIR": str(temporary)},
    )
    while not mark.exists():
        assert process.poll() is None, (folder / "errors").read_text()
        time.sleep(0.1)
    assert len(_processes(f"MOBILESAM_TEST={folder}")) > 1
    return process


def _wait_until_gone(folder: Path) -> None:
    while _processes(f"MOBILESAM_TEST={folder}"):
        time.sleep(0.1)  # an orphan hangs this test


HOLDING = pytest.param("ctypes.PyDLL(None).pause()", marks=pytest.mark.long)


@pytest.mark.parametrize("how", ["time.sleep(3600)", HOLDING])
def test_workers_end_with_a_killed_coordinator_and_the_next_run_removes_its_scratch_folder(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path, how: str
) -> None:
    out, temporary = tmp_path / "store.zarr", tmp_path / "tmp"
    process = _started(photos, out, tmp_path, how)
    process.kill()
    process.wait()
    _wait_until_gone(tmp_path)
    assert len(list(temporary.glob("mobilesam-*"))) == 1
    data = (photos / "2-coffee.png").read_bytes().removesuffix(b"HANG")
    (photos / "2-coffee.png").write_bytes(data)
    result = run_command(photos, out, "--shard-size", "1", env={"TMPDIR": str(temporary)})
    assert (result["done"], result["failed"]) == (7, 0)
    assert contents(out) == undisturbed
    assert not list(temporary.glob("*mobilesam-*"))


@pytest.mark.long
@pytest.mark.parametrize("how", ["time.sleep(3600)", HOLDING])
def test_a_signal_ends_the_run_while_a_worker_hangs(photos: Path, tmp_path: Path, how: str) -> None:
    process = _started(photos, tmp_path / "store.zarr", tmp_path, how)
    process.terminate()
    assert process.wait() == 143
    assert "run the same command to resume" in (tmp_path / "errors").read_text()
    _wait_until_gone(tmp_path)
    assert not list((tmp_path / "tmp").glob("*mobilesam-*"))


BROKEN = """
from pathlib import Path
from mobilesam.sam.teacher import Teacher
flag = Path({flag!r})
Teacher.real = Teacher.__dict__.get("real", Teacher.embed)  # a preload may run twice
def breaking(self, pixels):
    if not flag.exists():
        flag.touch()
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nCUDA kernel errors might ...")
    return self.real(pixels)
Teacher.embed = breaking
"""

RECURSIVE = """
from mobilesam.sam.teacher import Teacher
def recursive(self, pixels):
    return recursive(self, pixels)
Teacher.embed = recursive
"""


@pytest.mark.long
def test_an_endless_recursion_in_a_teacher_is_an_error_of_the_run(photos: Path, tmp_path: Path) -> None:
    """dask can't send its traceback, and would wait for ever."""
    command = command_of(photos, tmp_path / "store.zarr", "--shard-size", "7")
    env = {**os.environ, **preload(tmp_path, RECURSIVE)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)
    assert done.returncode == 3
    assert "failed 3 times" in done.stderr
    assert "maximum recursion depth exceeded" in done.stderr


@pytest.mark.long
def test_after_an_error_that_leaves_cuda_unusable_another_process_computes_the_shard(
    photos: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out, flag = tmp_path / "store.zarr", tmp_path / "broken"
    env = preload(tmp_path, BROKEN.format(flag=str(flag)))
    command = [*command_of(photos, out, "--shard-size", "1"), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **env}, cwd=tmp_path
    )
    assert flag.exists()
    assert (
        "ends: CUDA error: an illegal memory access was encountered; another one takes its place"
        in done.stderr
    )
    assert contents(out) == undisturbed


@pytest.mark.parametrize(
    ("text", "unusable"),
    [
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: out of memory", False),
        ("CUDA out of memory. Tried to allocate 2 GiB", False),
        ("shapes differ", False),
    ],
)
def test_which_errors_leave_cuda_unusable(text: str, unusable: bool) -> None:
    assert leaves_cuda_unusable(RuntimeError(text)) == unusable
