"""Taking out what is damaged, so that it is computed anew. What is whole is never touched."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.durable import explain_os_errors
from ..common.errors import StoreDamaged
from .check import OpenStore, Tell, full_problems, is_past_trust, quick_problems
from .check_shard import integrity_errors
from .images import tar_path
from .records import Problem
from .zarr_metadata import changed_documents, documents_of, write_documents


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What was done: shards withdrawn, files removed and rewritten (by their path in the store); `problems` are
    those that are mended by it, `left` those that are not."""

    withdrawn: tuple[int, ...]
    removed: tuple[str, ...]
    rewritten: tuple[str, ...]
    problems: tuple[Problem, ...]
    left: tuple[Problem, ...]


def repair(store: OpenStore, progress: Tell | None) -> Repair:
    """Check everything and mend what is damaged; the caller holds the writer's lock.

    Can be cut short anywhere and run again: shards are withdrawn before their files go, so that a file without a
    listing is the worst that is left.
    """
    assert store.own_lock, "only the store's writer repairs it"
    problems = full_problems(store, progress)
    if is_past_trust(problems):
        mended = _reindex(store)
        again = full_problems(store, progress) if mended else problems
        if is_past_trust(again):
            return Repair(withdrawn=(), removed=(), rewritten=(), problems=(), left=tuple(problems))
        problems = [*problems, *again]
    shards = _withdraw(store, problems)
    removed = _remove_files(store, shards, problems)
    rewritten = _rewrite_documents(store)
    left = quick_problems(store)
    return Repair(
        withdrawn=tuple(shards),
        removed=tuple(removed),
        rewritten=tuple(rewritten),
        problems=tuple(problem for problem in problems if problem not in left),
        left=tuple(left),
    )


def _reindex(store: OpenStore) -> bool:
    """Build the manifest's indexes anew when they are all that SQLite finds damaged; whether it could."""
    errors = integrity_errors(store.manifest)
    if not errors or not all("index" in error for error in errors):
        return False
    try:
        store.manifest.reindex()
    except StoreDamaged:
        return False
    return True


def _withdraw(store: OpenStore, problems: Sequence[Problem]) -> list[int]:
    damaged = {
        problem.shard
        for problem in problems
        if problem.shard is not None and problem.kind not in ("orphan", "audit")
    }
    size = store.spec.shard_size
    for shard in sorted(damaged):
        store.manifest.withdraw_shard(shard, range(shard * size, (shard + 1) * size))
    return sorted(damaged)


def _remove_files(store: OpenStore, shards: Sequence[int], problems: Sequence[Problem]) -> list[str]:
    """Remove the files of withdrawn shards, and what nothing lists."""
    places = [
        store.path / layout.name / layout.file_name(shard)
        for shard in shards
        for layout in store.spec.layouts
    ]
    places += [tar_path(store.path, shard) for shard in shards if store.spec.kept_images is not None]
    places += [Path(problem.file) for problem in problems if problem.kind == "orphan" and problem.file]
    removed = []
    for path in places:
        with explain_os_errors(path):
            if os.path.lexists(path):
                path.unlink()
                removed.append(str(path.relative_to(store.path)))
    return removed


def _rewrite_documents(store: OpenStore) -> list[str]:
    """Put back every zarr.json that isn't as written, and the manifest's own copies of them and of the spec."""
    try:
        store.manifest.spec()
    except StoreDamaged:
        store.manifest.restore_spec(store.spec)
    try:
        documents = store.manifest.documents()
    except StoreDamaged:
        documents = documents_of(store.spec, store.manifest.row_count())
        store.manifest.restore_documents(documents)
    with explain_os_errors(store.path):
        changed = changed_documents(store.path, documents)
        write_documents(store.path, documents)
    return changed
