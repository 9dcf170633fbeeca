"""Distillation: students, the objective, the loader that feeds them, the trainer, and what a run leaves behind.

Names are loaded on first use, so that importing this package costs nothing (no torch).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DistillConfig
    from .errors import DistillError, DistillInterrupted
    from .evaluation import embed, evaluate
    from .job import distill
    from .loader import Batch, Loader
    from .mean import mean_embedding
    from .metrics import ImageMetrics, Metrics
    from .progress import Progress
    from .run import Run
    from .stop import StopFlag
    from .students import STUDENTS, build_student, load_student, save_student

_HOME = {
    "STUDENTS": "students",
    "Batch": "loader",
    "DistillConfig": "config",
    "DistillError": "errors",
    "DistillInterrupted": "errors",
    "ImageMetrics": "metrics",
    "Loader": "loader",
    "Metrics": "metrics",
    "Progress": "progress",
    "Run": "run",
    "StopFlag": "stop",
    "build_student": "students",
    "distill": "job",
    "embed": "evaluation",
    "evaluate": "evaluation",
    "load_student": "students",
    "mean_embedding": "mean",
    "save_student": "students",
}

__all__ = [
    "STUDENTS",
    "Batch",
    "DistillConfig",
    "DistillError",
    "DistillInterrupted",
    "ImageMetrics",
    "Loader",
    "Metrics",
    "Progress",
    "Run",
    "StopFlag",
    "build_student",
    "distill",
    "embed",
    "evaluate",
    "load_student",
    "mean_embedding",
    "save_student",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
