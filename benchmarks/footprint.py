"""Peak memory of precompute and distill over many rows against few: it should not grow with the data set.

    python -m benchmarks.footprint

runs each in processes of its own, over pictures of 64 pixels; for precompute, coordinator and workers are added up.
Shard, batch and everything else are the same on both sides. (`benchmarks.scale` measures the curves in between.)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import psutil

from benchmarks.support.figures import Figure, report
from benchmarks.support.memory import peak_resident
from benchmarks.support.pictures import make_pictures
from benchmarks.support.sampling import worker_processes
from mobilesam.distill import DistillConfig, distill
from mobilesam.precompute import PrecomputeConfig, precompute
from mobilesam.precompute.progress import SilentObserver, Snapshot

ROOT = Path(__file__).parents[1]
SIDE = 64
SHARD_SIZE = 16
BATCH = 16
TARGET = 1.05


class _Peaks(SilentObserver):
    """Sum of the peaks of coordinator and workers, updated whenever precompute reports progress."""

    def __init__(self) -> None:
        self.bytes = 0
        self._workers: dict[str, psutil.Process] = {}

    def progress(self, snapshot: Snapshot) -> None:
        self._workers = self._workers or worker_processes()
        peaks = [peak_resident(), *(peak_resident(worker.pid) for worker in self._workers.values())]
        self.bytes = max(self.bytes, sum(peaks))


def embed(folder: Path, rows: int) -> int:
    """Precompute the first `rows` pictures; return the peak in bytes."""
    peaks = _Peaks()
    config = PrecomputeConfig(
        images=(folder / "pictures",),
        out=_store(folder, rows),
        teacher="vit_nano",
        image_size=SIDE,
        device="cpu",
        limit=rows,
        shard_size=SHARD_SIZE,
        batch_size=8,
        audit=0,
    )
    done = precompute(config, peaks)["done"]
    assert done == rows, f"{done} of {rows} rows were done"
    return peaks.bytes


def train(folder: Path, rows: int) -> int:
    """Train TinyViT on them for an epoch; return the peak in bytes."""
    distill(
        DistillConfig(
            store=_store(folder, rows),
            epochs=1,
            batch_size=BATCH,
            micro_batch=BATCH,
            device="cpu",
            precision="float32",
            out=folder / f"run-{rows}",
        )
    )
    return peak_resident()


def _store(folder: Path, rows: int) -> Path:
    return folder / f"{rows}.zarr"


JOBS = {"precompute": embed, "distill": train}


@click.command()
@click.option("--few", default=100, show_default=True, help="Rows of the smaller set.")
@click.option("--many", default=10_000, show_default=True, help="Rows of the larger one.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--alone", hidden=True, nargs=3, type=(click.Choice(list(JOBS)), Path, int))
def main(few: int, many: int, as_json: bool, alone: tuple[str, Path, int] | None) -> None:
    """Print the ratio of the peaks."""
    if alone is not None:
        name, folder, rows = alone
        print(json.dumps(JOBS[name](folder, rows)))
        return
    with tempfile.TemporaryDirectory(prefix="footprint-") as temporary:
        folder = Path(temporary)
        make_pictures(folder / "pictures", many, SIDE)
        report([_figure(name, folder, few, many) for name in JOBS], [], as_json=as_json)


def _figure(name: str, folder: Path, few: int, many: int) -> Figure:
    small, large = (_in_a_process(name, folder, rows) for rows in (few, many))
    return Figure(
        what=f"peak memory of {name}: {many:,} rows / {few:,} rows",
        value=large / small,
        target=TARGET,
        at_least=False,
        sides=f"{large / 2**20:.0f} / {small / 2**20:.0f} MiB",
    )


def _in_a_process(name: str, folder: Path, rows: int) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.footprint", "--alone", name, str(folder), str(rows)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
