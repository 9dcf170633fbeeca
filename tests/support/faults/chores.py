"""What is run in a process that has a disk of its own; it finds functions by their module's name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from distributed import LocalCluster
from safetensors.torch import load_file

from mobilesam.distill import DistillConfig, distill
from mobilesam.precompute import PrecomputeConfig, precompute

_clusters: list[LocalCluster] = []


def clear(path: Path) -> None:
    for entry in path.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def embed(**options: Any) -> dict[str, Any]:
    """Precompute, on a worker in the process that has the disk."""
    if not _clusters:
        _clusters.append(
            LocalCluster(
                n_workers=1, threads_per_worker=2, processes=False, protocol="tcp", host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
            )
        )  # fmt: skip
    settings = {"teacher": "vit_nano", "image_size": 64, "shard_size": 3, "audit": 0}
    return precompute(
        PrecomputeConfig(**settings, scheduler=_clusters[0].scheduler_address, **options)  # type: ignore[arg-type]
    )


def train(**options: Any) -> dict[str, Any]:
    return distill(
        DistillConfig(
            epochs=2, batch_size=4, device="cpu", precision="float32", checkpoint_seconds=1e-9, **options
        )
    )


def student_bytes(folder: Path) -> dict[str, bytes]:
    return {
        name: value.numpy().tobytes() for name, value in load_file(folder / "student.safetensors").items()
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if not path.name.startswith("events.")}
