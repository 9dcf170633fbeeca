"""Time and peak memory of one operation on a large store or folder, in a process of its own.

    python -m benchmarks.support.probe NAME ARGUMENT...

Prints one JSON object: `seconds` and `processor_seconds`, without Python's start and imports; `peak_bytes`, resident,
with them; and `found`, the operation's result.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.support.memory import peak_resident
from mobilesam.store import EmbeddingStore
from mobilesam.store.inspection import inspect_store


def count(store: str) -> dict[str, Any]:
    """Open a store for reading, and count its rows by status."""
    with EmbeddingStore.open(store) as opened:
        counts = opened.manifest.counts()
    return {"done": counts.done, "failed": counts.failed, "pending": counts.pending}


def inspect(store: str) -> dict[str, Any]:
    """Inspect a store as `mobilesam inspect STORE` does."""
    result = inspect_store(store)
    return {"rows": result["rows"], "problems": len(result["problems"])}


def resume(store: str) -> dict[str, Any]:
    """Do what a rerun does with the store before its first task.

    It opens the store as its writer, lists the pending shards, and reads the records of the first of them.
    """
    with EmbeddingStore.open(store, writable=True) as opened:
        pending = opened.pending_shards()
        records = opened.manifest.records(None, opened.shard_rows(pending[0]))
    return {"pending_shards": len(pending), "records": len(records)}


class _Begun(Exception):
    """Raised when the first task is with a worker, which ends the measurement."""


def start_precompute(images: str, store: str) -> dict[str, Any]:
    """Run `precompute` until its first task is with a worker."""
    from mobilesam.precompute import PrecomputeConfig, precompute
    from mobilesam.precompute.progress import SilentObserver, Snapshot

    class Observer(SilentObserver):
        """Ends the run at the first report of progress."""

        def progress(self, snapshot: Snapshot) -> None:
            found.update(
                images=snapshot.images, seconds=time.perf_counter() - began, peak_bytes=peak_resident()
            )
            raise _Begun

    found: dict[str, Any] = {}
    config = PrecomputeConfig(
        images=(Path(images),),
        out=Path(store),
        teacher="vit_nano",
        image_size=64,
        device="cpu",
        shard_size=64,
        audit=0,
    )
    began = time.perf_counter()
    try:
        precompute(config, Observer())
    except _Begun:
        return found
    raise SystemExit("precompute ended without a task")


def start_distill(store: str, run: str) -> dict[str, Any]:
    """Run `distill` until it asks for its first image, which is missing.

    The store has no embeddings either, so that the recipe is one that reads none before training.
    """
    from mobilesam.distill import DistillConfig, distill
    from mobilesam.sam import ImageError

    try:
        distill(
            DistillConfig(
                store=Path(store),
                recipe="mobilesam-2023",
                epochs=1,
                device="cpu",
                precision="float32",
                out=Path(run),
            )
        )
    except ImageError:
        return {}
    raise SystemExit("distill found an image where there is none")


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    probe.__name__: probe for probe in (count, inspect, resume, start_precompute, start_distill)
}


def main() -> None:
    """Run the operation that is named first on the command line."""
    name, *arguments = sys.argv[1:]
    began, busy = time.perf_counter(), time.process_time()
    found = PROBES[name](*arguments)
    cost = {
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - busy,
        "peak_bytes": peak_resident(),
    }
    print(json.dumps({**cost, "found": found} | found))


if __name__ == "__main__":
    main()
