"""Precompute command that waits in the middle of its work, for tests of locks and clocks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.fixtures import environment

from mobilesam.store import EmbeddingStore, StoreError

# After two images the worker waits for a file. dask runs a preload more than once in a process: what it wraps is the
# original every time.
WAITING = """
import itertools, pathlib, time
import mobilesam.precompute.decode as decode
from mobilesam.sam import load_image
count = itertools.count()
def waiting(data, image_size):
    if next(count) >= 2:
        while not pathlib.Path({gate!r}).exists():
            time.sleep(0.05)
    return load_image(data, image_size)
decode.load_image = waiting
"""


def precompute_arguments(pictures: Path, store: Path) -> list[str]:
    """Return arguments of a precompute with one picture a shard."""
    return [
        "precompute", "--images", str(pictures), "--out", str(store), "--teacher", "vit_nano",
        "--image-size", "64", "--shard-size", "1", "--json",
    ]  # fmt: skip


@contextmanager
def waiting_writer(
    folder: Path, pictures: Path, store: Path, **environ: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a precompute in its own session that has committed a shard and waits for the file `folder / "gate"`."""
    preload = folder / "preload.py"
    preload.write_text(WAITING.format(gate=str(folder / "gate")))
    process = subprocess.Popen(
        [sys.executable, "-m", "mobilesam", *precompute_arguments(pictures, store)],
        env=environment(DASK_DISTRIBUTED__WORKER__PRELOAD=str(preload), **environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        while committed(store) < 1:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def committed(path: Path) -> int:
    """Return the number of committed shards; 0 while there is no store."""
    try:
        with EmbeddingStore.open(path) as store:
            return len(store.manifest.committed_shards())
    except StoreError:
        return 0
