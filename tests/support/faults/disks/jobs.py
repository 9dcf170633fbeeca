"""Jobs for the process that has the small disk; they live in a module since calls are pickled by name."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from one_process import one_process_cluster, precompute_small
from safetensors.torch import load_file

from mobilesam.distill import DistillConfig, distill

_cluster = ExitStack()
_addresses: list[str] = []


def clear(path: Path) -> None:
    """Delete everything in a folder."""
    for entry in path.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def embed(**options: Any) -> dict[str, Any]:
    """Precompute on a worker in the process that has the disk."""
    if not _addresses:
        _addresses.append(_cluster.enter_context(one_process_cluster()).scheduler_address)
    return precompute_small(scheduler=_addresses[0], **options)


def train(**options: Any) -> dict[str, Any]:
    """Train for two epochs on the CPU, with a checkpoint after each step."""
    return distill(
        DistillConfig(
            epochs=2, batch_size=4, device="cpu", precision="float32", checkpoint_seconds=1e-9, **options
        )
    )


def student_bytes(folder: Path) -> dict[str, bytes]:
    """Read the weights of a run's student as bytes."""
    return {
        name: value.numpy().tobytes() for name, value in load_file(folder / "student.safetensors").items()
    }


def names(folder: Path) -> set[str]:
    """Return the names of all files in a run but TensorBoard's."""
    return {path.name for path in folder.rglob("*") if not path.name.startswith("events.")}
