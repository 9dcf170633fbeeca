"""The dask job: pending shards -> images -> teacher -> store.

In the order of a run: config, plan (selection, sizing), opening, cluster, job (progress, interrupts, suspects) in
the coordinator; worker (tasks, decoding) in dask's workers.

Names are loaded on first use, so that importing this package costs nothing (no dask).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PrecomputeConfig
    from .errors import PrecomputeError, PrecomputeInterrupted
    from .preview import dry_run
    from .progress import Observer, Snapshot
    from .run import precompute

_HOME = {
    "Observer": "progress",
    "PrecomputeConfig": "config",
    "PrecomputeError": "errors",
    "PrecomputeInterrupted": "errors",
    "Snapshot": "progress",
    "dry_run": "preview",
    "precompute": "run",
}

__all__ = [
    "Observer",
    "PrecomputeConfig",
    "PrecomputeError",
    "PrecomputeInterrupted",
    "Snapshot",
    "dry_run",
    "precompute",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
