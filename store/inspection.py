"""What a store is, whether it is whole, and mending it: `mobilesam inspect`.

Without a check only the manifest and a few small files are read, and nothing heavy is imported: it answers within a
second, however many rows there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .check import OpenStore, full_problems, quick_problems
from .command import precompute_command
from .durable import explained
from .errors import StoreDamaged, StoreError, StoreNotFound
from .kept_images import FOLDER
from .layout import shard_count
from .lock import WriterLock
from .manifest import Manifest
from .metadata import read_spec
from .places import MANIFEST, PRIVATE, local_path
from .records import Problem
from .repair import Repair
from .repair import repair as mend
from .spec import StoreSpec
from .tolerance import audit_summary, tolerance


def inspect_store(
    path: Path | str,
    *,
    check: bool = False,
    repair: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Describe the store as plain JSON values.

    `problems` holds what can be told at once; with `check` (reads everything, in threads; `progress` hears of rows
    read and rows to read) all of it; with `repair` (which checks first, as the store's only writer) what is left.

    Raises StoreNotFound; StoreDamaged when the manifest is missing, unreadable or another store's; StoreLocked when
    somebody else writes and a repair was asked for.
    """
    path = local_path(path)
    with _opened(path, writable=repair) as store:
        done = None
        if repair:
            done = mend(store, progress)
            problems = list(done.left)
        else:
            problems = full_problems(store, progress) if check else quick_problems(store)
        return _description(store) | {
            "checked": check or repair,
            "problems": [problem.to_json() for problem in problems],
            "repaired": None if done is None else _repair_json(done),
            "command": _command(store, problems),
        }


@contextmanager
def _opened(path: Path, *, writable: bool) -> Iterator[OpenStore]:
    """The store at the path, also when its zarr.json is not as written; with `writable` under the writer's lock."""
    place = path / MANIFEST
    if not place.exists():
        read_spec(path)  # StoreNotFound, where there is none
    lock = None
    if writable:
        lock = WriterLock(path / PRIVATE)
        lock.acquire()
    try:
        manifest = Manifest(place, writable=writable)
        try:
            yield OpenStore(path=path, spec=_spec(path, manifest), manifest=manifest, own_lock=writable)
        finally:
            manifest.close()
    finally:
        if lock:
            lock.release()


def _spec(path: Path, manifest: Manifest) -> StoreSpec:
    """The spec that the manifest was made with, from wherever it is whole. StoreDamaged when zarr.json is whole,
    and another store's."""
    try:
        spec = manifest.spec()
    except StoreDamaged:
        spec = read_spec(path)
        manifest.refuse_foreign(spec)
        return spec
    try:
        found = read_spec(path)
    except (StoreDamaged, StoreNotFound, StoreError):
        return spec
    if found.store_id != spec.store_id:
        manifest.refuse_foreign(found)
    return spec


def _description(store: OpenStore) -> dict[str, Any]:
    spec, manifest = store.spec, store.manifest
    counts, committed = manifest.counts(), manifest.committed_shards()
    selection = manifest.selections()[-1]
    return {
        "store": str(store.path),
        "rows": {"done": counts.done, "pending": counts.pending, "failed": counts.failed},
        "bytes": _bytes_on_disk(store),
        "teacher": spec.teacher,
        "checkpoint": spec.checkpoint,
        "checkpoint_sha256": spec.checkpoint_sha256,
        "image_size": spec.image_size,
        "preprocessing": dict(spec.preprocessing),
        "dtype": spec.dtype,
        "precision": spec.precision,
        "shard_size": spec.shard_size,
        "shards": {"committed": len(committed), "all": shard_count(counts.rows, spec.shard_size)},
        "subset": {"fraction": selection.fraction, "seed": selection.seed, "limit": selection.limit},
        "image_root": spec.image_root,
        "kept_images": spec.kept_images,
        "versions": dict(spec.versions),
        "audit": audit_summary(manifest.audits(), tolerance(spec.dtype, spec.precision)),
        "writer": store.writer(),
    }


def _bytes_on_disk(store: OpenStore) -> int:
    """The lengths of all the store's files together."""
    folders = [store.path, store.path / PRIVATE, *(store.path / layout.name for layout in store.spec.layouts)]
    if store.spec.kept_images is not None:
        folders.append(store.path / FOLDER)
    return sum(_file_bytes(folder) for folder in folders)


def _file_bytes(folder: Path) -> int:
    total = 0
    with explained(folder):
        try:
            entries = os.scandir(folder)
        except FileNotFoundError:
            return 0  # told as a problem elsewhere
        with entries:
            for entry in entries:
                # A writer may have renamed or removed it meanwhile.
                with suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False):
                        total += entry.stat(follow_symlinks=False).st_size
    return total


def _command(store: OpenStore, problems: Sequence[Problem]) -> str | None:
    pending = store.manifest.counts().pending
    if not pending and not any(problem.kind == "head" for problem in problems):
        return None
    return precompute_command(store.path, store.spec, store.manifest.selections()[-1])


def _repair_json(done: Repair) -> dict[str, Any]:
    return {
        "withdrawn": list(done.withdrawn),
        "removed": list(done.removed),
        "rewritten": list(done.rewritten),
        "problems": [problem.to_json() for problem in done.problems],
    }
