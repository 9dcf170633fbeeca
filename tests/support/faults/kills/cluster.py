"""Dask cluster of forked processes, a few small pictures, and jobs on them."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from faults.kills.fork_server import GUARD_SECONDS, ForkServer, Process
from PIL import Image

PICTURES = 8
SHARD_SIZE = 2


class FaultCluster:
    """Dask cluster whose processes are killed one by one. `folder` holds all its files."""

    def __init__(self, fork_server: ForkServer, folder: Path) -> None:
        self.fork_server = fork_server
        self.folder = folder
        self.photos = draw_pictures(folder / "photos")
        self._numbers = itertools.count()
        self._worker: Process | None = None
        address = folder / "address"
        self._scheduler = fork_server.start("scheduler", address_file=str(address))
        deadline = time.monotonic() + GUARD_SECONDS
        while not address.exists():
            assert time.monotonic() < deadline, self._scheduler.printed()
            time.sleep(0.01)
        self.address = address.read_text()

    def new_folder(self) -> Path:
        """Make and return a new empty folder."""
        folder = self.folder / f"{next(self._numbers):05d}"
        folder.mkdir()
        return folder

    def start_worker(
        self,
        stages: Path | None = None,
        tracer: Callable[[int], object] | None = None,
        slow: float = 0.0,
        mutation: str | None = None,
    ) -> Process:
        """Start a worker, after killing the one before.

        Args:
            stages: File for the worker's stages; a new one if None.
            tracer: Attached to the worker before it starts.
            slow: Delay of each row, seconds.
            mutation: Safeguard that the worker lacks.
        """
        self.kill_worker()
        folder = self.new_folder()
        self._worker = self.fork_server.start(
            "worker",
            tracer=tracer,
            address=self.address,
            stage_file=str(stages or folder / "stages"),
            local=str(folder),
            slow=slow,
            mutation=mutation,
        )
        return self._worker

    def kill_worker(self) -> None:
        """Kill the worker, if there is one."""
        if self._worker is not None:
            self.fork_server.kill(self._worker)
            self.fork_server.wait(self._worker)
            self._worker = None

    def ensure_worker(self) -> None:
        """Start a worker unless one is running, as dask's nanny does."""
        if self._worker is None or not self.fork_server.running(self._worker):
            self._worker = None
            self.start_worker()

    def start_precompute(
        self,
        out: Path,
        stages: Path,
        *options: str,
        photos: Path | None = None,
        tracer: Callable[[int], object] | None = None,
        mutation: str | None = None,
    ) -> Process:
        """Start `mobilesam precompute` on the cluster."""
        arguments = [
            "--images", str(photos or self.photos), "--out", str(out), "--teacher", "vit_nano", "--image-size", "64",
            "--shard-size", str(SHARD_SIZE), "--scheduler", self.address, "--json", *options,
        ]  # fmt: skip
        return self.fork_server.start(
            "coordinator", tracer=tracer, arguments=arguments, stage_file=str(stages), mutation=mutation
        )

    def precompute(self, out: Path, *options: str, photos: Path | None = None) -> None:
        """Run `mobilesam precompute` to its end; assert that it succeeds."""
        self.ensure_worker()
        process = self.start_precompute(out, self.new_folder() / "stages", *options, photos=photos)
        code = self.fork_server.wait(process)
        assert code == 0, f"precompute ended with {code}:\n{process.printed()}"

    def start_repair(
        self, store: Path, stages: Path, tracer: Callable[[int], object] | None = None
    ) -> Process:
        """Start `mobilesam inspect --repair`."""
        return self.fork_server.start(
            "inspector", tracer=tracer, arguments=[str(store), "--repair"], stage_file=str(stages)
        )

    def start_distill(
        self,
        store: Path,
        out: Path,
        stages: Path,
        tracer: Callable[[int], object] | None = None,
        **settings: Any,
    ) -> Process:
        """Start `mobilesam distill` of a tiny student, with a checkpoint after each step."""
        return self.fork_server.start(
            "trainer",
            tracer=tracer,
            cwd=out.parent,
            stage_file=str(stages),
            **{
                "store": str(store),
                "out": str(out),
                "student": "two_convs",
                "epochs": 2,
                "batch_size": 2,
                "val_fraction": 0.2,
                "checkpoint_seconds": 1e-9,
                **settings,
            },
        )

    def close(self) -> None:
        """Kill worker and scheduler."""
        self.kill_worker()
        self.fork_server.kill(self._scheduler)
        self.fork_server.wait(self._scheduler)


def draw_pictures(folder: Path, number: int = PICTURES) -> Path:
    """Write small pictures of smooth noise, each of another size; return the folder."""
    folder.mkdir()
    rng = np.random.default_rng(7)
    for count in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((64 - 3 * count, 40 + 2 * count)).save(folder / f"{count}.png")
    return folder


def copy_tree(source: Path, target: Path) -> None:
    """Copy a store or a run, links included."""
    shutil.copytree(source, target, symlinks=True)
