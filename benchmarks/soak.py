"""Memory, descriptors and time of long runs of precompute and distill over small pictures, as curves.

`benchmarks.scale` starts each in a process of its own:

    python -m benchmarks.soak precompute FOLDER
    python -m benchmarks.soak distill FOLDER

FOLDER holds `pictures/`; stores are written beside them. The last line printed is the curve as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from torch import nn

from benchmarks.support.sampling import Sample, Watch, curve, worker_processes
from mobilesam.distill import DistillConfig, distill
from mobilesam.distill.students.registry import STUDENTS, StudentInfo
from mobilesam.distill.train_log import Progress
from mobilesam.precompute import PrecomputeConfig, precompute
from mobilesam.precompute.progress import Snapshot

SIDE = 64
"""Pixels: the smallest image that a teacher takes."""

BATCH_ON_TEACHER = 8
BATCH_ON_STUDENT = 64
VAL_FRACTION = 0.02
SAMPLES = 200
PER_POINT = 1000
FEWEST_POINTS = 8
LIGHT_STUDENT = "light"


class _Observer:
    """Observer that takes a sample whenever precompute reports progress."""

    def __init__(self, every: int) -> None:
        self._every = every
        self.watch: Watch | None = None

    def message(self, text: str) -> None:
        print(text, flush=True)

    def download(self, done: int, total: int) -> None: ...

    def progress(self, snapshot: Snapshot) -> None:
        if self.watch is None:  # the workers run by the time of the first call
            self.watch = Watch({"coordinator": psutil.Process(), **worker_processes()}, self._every)
        self.watch.look(snapshot.computed)


def soak_precompute(folder: Path) -> tuple[dict[str, Any], list[Sample], int]:
    """Embed every picture with vit_nano, in a worker process as by default; return result, samples, images."""
    pictures = sum(1 for _ in (folder / "pictures").rglob("*.jpg"))
    observer = _Observer(pictures // SAMPLES)
    result = precompute(_embedding(folder, "store.zarr", pictures), observer)
    assert observer.watch is not None, "precompute reported no progress"
    if (result["done"], result["done_before"], result["failed"]) != (pictures, 0, 0):
        raise SystemExit(f"{pictures} pictures, but precompute says {result}")
    return result, observer.watch.samples, pictures


def _embedding(folder: Path, store: str, images: int) -> PrecomputeConfig:
    """Return the configuration that embeds so many of the pictures with vit_nano, into a store of that name."""
    return PrecomputeConfig(
        images=(folder / "pictures",),
        out=folder / store,
        teacher="vit_nano",
        image_size=SIDE,
        device="cpu",
        limit=images,
        shard_size=max(1, min(64, images // 24)),
        batch_size=BATCH_ON_TEACHER,
    )


def soak_distill(folder: Path, student: str, images: int) -> tuple[dict[str, Any], list[Sample], int]:
    """Train a student for one epoch on so many pictures; return result, samples, images trained."""
    config = _embedding(folder, "trained.zarr", images)
    precompute(config)
    watch = Watch({"trainer": psutil.Process()}, every=0)
    batch = max(1, min(BATCH_ON_STUDENT, images // 24))

    def look(progress: Progress) -> None:
        if progress.phase == "train":
            watch.look(progress.step * batch)

    training = DistillConfig(
        store=config.out,
        student=student,
        epochs=1,
        batch_size=batch,
        micro_batch=batch,
        val_fraction=VAL_FRACTION,
        device="cpu",
        precision="float32",
        out=folder / f"run-{student}",
        restart=True,
    )
    result = distill(training, progress=look)
    return result, watch.samples, watch.samples[-1].images


class LightStudent(nn.Module):
    """Student of one layer, for machines where TinyViT takes too long.

    It shows leaks of loader, trainer and logs, but none of TinyViT.
    """

    def __init__(self, _image_size: int, _student_size: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 256, 16, 16)
        self.norm = nn.BatchNorm2d(256)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Embed pixels (B, 3, S, S) as (B, 256, S/16, S/16)."""
        return self.norm(self.patches(pixels_BCHW))


def _add_light_student() -> None:
    light = StudentInfo(
        name=LIGHT_STUDENT,
        summary="one layer",
        build=LightStudent,
        training_bytes={"float32": 1, "bfloat16": 1},
    )
    STUDENTS[LIGHT_STUDENT] = light


@click.command()
@click.argument("what", type=click.Choice(["precompute", "distill"]))
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--student", default="tiny_vit")
@click.option("--images", default=21_000, help="Images to train on; for distill only.")
def main(what: str, folder: Path, student: str, images: int) -> None:
    """Run one soak and print its curve."""
    if what == "precompute":
        result, samples, images = soak_precompute(folder)
    else:
        _add_light_student()
        result, samples, images = soak_distill(folder, student, images)
    print(json.dumps({"images": images, "result": result, "points": _points(samples, images)}))


def _points(samples: Sequence[Sample], images: int) -> list[dict[str, Any]]:
    points = curve(samples, images, max(FEWEST_POINTS, images // PER_POINT))
    return [asdict(point) for point in points]


if __name__ == "__main__":
    main()
