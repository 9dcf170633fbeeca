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
"""Seconds after which a command counts as hung; on an idle machine none takes a fiftieth of that."""

SIZES = ((48, 64), (64, 64), (64, 30), (20, 64), (64, 50), (33, 64), (64, 60))


@dataclass(frozen=True)
class Done:
    """Exit code and output of a finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, parsed as one JSON object."""
        return json.loads(self.out)


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment for a subprocess, with one thread so that many tests share the machine."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": ""} | changes


def mobilesam(
    *arguments: str | Path,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    prefix: tuple[str, ...] = (),
) -> Done:
    """Run the command line in a subprocess; `prefix` holds words that precede it (nsenter, setpriv, ...)."""
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


def refused(done: Done, *expected: str) -> str:
    """Assert exit code 3 and one clear error of at most two lines; return the error's text."""
    assert done.code == 3, (done.code, done.err)
    assert "Traceback" not in done.err
    assert "This is a bug" not in done.err
    assert done.out == ""
    _, _, message = done.err.rpartition("error: ")
    assert 1 <= len(message.splitlines()) <= 2, done.err
    for text in expected:
        assert text in message, done.err
    return message


def save_pictures(folder: Path, sizes: tuple[tuple[int, int], ...] = SIZES, seed: int = 0) -> Path:
    """Write pictures of smooth noise, 0.png and so on, of (height, width) pixels; return the folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number, (height, width) in enumerate(sizes):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def contents(path: Path) -> dict[str, bytes | None]:
    """Return {relative name: bytes} of everything below a path; a folder has None."""
    return {
        str(file.relative_to(path)): file.read_bytes() if file.is_file() else None for file in path.rglob("*")
    }


@pytest.fixture(scope="session")
def scheduler() -> Iterator[str]:
    """Address of a dask cluster whose one worker runs in this process, so that nothing has to start."""
    with one_process_cluster() as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Folder of seven small pictures that the test may change."""
    return save_pictures(tmp_path / "photos")


@pytest.fixture
def run(scheduler: str, tmp_path: Path, pictures: Path) -> Callable[..., dict[str, Any]]:
    """Function run(name, **options) that precomputes the pictures at 64 pixels into tmp_path / name.

    Shards hold 3 images; the worker runs in this process.
    """

    def run_precompute(name: str = "store.zarr", **options: Any) -> dict[str, Any]:
        given = {"images": (pictures,), "out": tmp_path / name, "scheduler": scheduler}
        return precompute_small(**(given | options))

    return run_precompute


@pytest.fixture
def many(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """Function many(full, few) that returns how many faults to inject: `full` with --kill-points full, else `few`."""
    full = request.config.getoption("--kill-points", "few") == "full"
    return lambda often, seldom: often if full else seldom
