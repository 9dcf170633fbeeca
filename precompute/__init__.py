"""The dask job: pending shards -> images -> teacher -> store.

In the order of a run: config, plan (selection, sizing), opening, cluster, job (progress, interrupts, suspects) in
the coordinator; worker (tasks, decoding) in dask's workers.
"""

from .config import PrecomputeConfig
from .dry_run import dry_run
from .errors import PrecomputeError, PrecomputeInterrupted
from .precompute import precompute
from .progress import Observer, Snapshot

__all__ = [
    "Observer",
    "PrecomputeConfig",
    "PrecomputeError",
    "PrecomputeInterrupted",
    "Snapshot",
    "dry_run",
    "precompute",
]
