"""Fixtures of the fault suite: pictures, precompute in this process, the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_process import one_process_cluster, precompute_small
from PIL import Image

HANGING = 1800
"""Seconds after which a command is taken to hang; on an idle machine none takes a fiftieth of it."""

SIZES = ((48, 64), (64, 64), (64, 30), (20, 64), (64, 50), (33, 64), (64, 60))


@dataclass(frozen=True)
class Done:
    """What came of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as the one JSON object that it must be."""
        return json.loads(self.out)


def environment(**changes: str) -> dict[str, str]:
    """This process's environment for a subprocess: one thread, so that many tests share the machine."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": ""} | changes


def mobilesam(
    *arguments: str | Path,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    prefix: tuple[str, ...] = (),
) -> Done:
    """Run the command line in a process of its own; `prefix` are words before it (nsenter, setpriv, ...)."""
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "mobilesam", *map(str, arguments)],
        cwd=cwd,
        env=env or environment(),
        capture_output=True,
        check=False,
        timeout=HANGING,
    )
    return Done(
        done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    )


def refused(done: Done, *said: str) -> str:
    """Check that a command ended with exit code 3 and one clear error of at most two lines; its text."""
    assert done.code == 3, (done.code, done.err)
    assert "Traceback" not in done.err
    assert "This is a bug" not in done.err
    assert done.out == ""
    _, _, message = done.err.rpartition("error: ")
    assert 1 <= len(message.splitlines()) <= 2, done.err
    for text in said:
        assert text in message, done.err
    return message


def save_pictures(folder: Path, sizes: tuple[tuple[int, int], ...] = SIZES, seed: int = 0) -> Path:
    """Make a folder of pictures of smooth noise, 0.png and so on, of (height, width) pixels."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number, (height, width) in enumerate(sizes):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def contents(path: Path) -> dict[str, bytes | None]:
    """Every file and folder below a path: its bytes, None for a folder."""
    return {
        str(file.relative_to(path)): file.read_bytes() if file.is_file() else None for file in path.rglob("*")
    }


@pytest.fixture(scope="session")
def scheduler() -> Iterator[str]:
    """The address of a cluster whose one worker lives in this process: no start-up to wait for."""
    with one_process_cluster() as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven small pictures that the test may change."""
    return save_pictures(tmp_path / "photos")


@pytest.fixture
def run(scheduler: str, tmp_path: Path, pictures: Path) -> Callable[..., dict[str, Any]]:
    """run(name, ...options) precomputes the pictures at 64 pixels into a store of that name under tmp_path, in
    shards of 3, on a worker in this process."""

    def run_precompute(name: str = "store.zarr", **options: Any) -> dict[str, Any]:
        given = {"images": (pictures,), "out": tmp_path / name, "scheduler": scheduler}
        return precompute_small(**(given | options))

    return run_precompute


@pytest.fixture
def many(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """many(full, few): how often, in the long suite and else."""
    full = request.config.getoption("--kill-points", "few") == "full"
    return lambda often, seldom: often if full else seldom
