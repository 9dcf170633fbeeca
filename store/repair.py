"""Repair: withdraw damaged shards so that they are recomputed, remove unlisted files, restore metadata."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.durable import explain_os_errors
from ..common.errors import StoreDamaged
from .check import (
    InspectedStore,
    ProgressCallback,
    full_problems,
    integrity_errors,
    manifest_is_damaged,
    quick_problems,
)
from .kept_images import tar_path
from .manifest import ManifestWriter
from .records import Problem
from .zarr_metadata import changed_documents, documents_of, write_documents


@dataclass(frozen=True, kw_only=True)
class Repair:
    """Result of a repair."""

    withdrawn: tuple[int, ...]
    """Shards withdrawn, ascending."""
    removed: tuple[str, ...]
    """Files removed, by their path in the store."""
    rewritten: tuple[str, ...]
    """Files rewritten, by their path in the store."""
    problems: tuple[Problem, ...]
    """Problems that were repaired."""
    left: tuple[Problem, ...]
    """Problems that remain."""


def repair_store(store: InspectedStore, progress: ProgressCallback | None) -> Repair:
    """Check everything and repair what is damaged; intact shards are never touched.

    The caller holds the writer's lock. A repair may be interrupted anywhere and run again: shards are withdrawn
    before their files are removed, so that an interruption leaves at worst files that are not listed.

    Args:
        store: store with a writable manifest.
        progress: called with rows checked so far and rows committed in all; None to report nothing.

    Returns:
        The changes, and the problems that remain. If the manifest is damaged beyond its indexes, nothing is changed
        and all problems remain.

    Raises:
        StoreError: a file can't be read, removed or written.
    """
    manifest = store.manifest
    assert isinstance(manifest, ManifestWriter), "only the store's writer repairs it"
    problems = full_problems(store, progress)
    if manifest_is_damaged(problems):
        rebuilt = _reindex(manifest)
        again = full_problems(store, progress) if rebuilt else problems
        if manifest_is_damaged(again):
            return Repair(withdrawn=(), removed=(), rewritten=(), problems=(), left=tuple(problems))
        problems = [*problems, *again]
    shards = _withdraw(manifest, problems, store.spec.shard_size)
    removed = _remove_files(store, shards, problems)
    rewritten = _rewrite_documents(store, manifest)
    left = quick_problems(store)
    return Repair(
        withdrawn=tuple(shards),
        removed=tuple(removed),
        rewritten=tuple(rewritten),
        problems=tuple(problem for problem in problems if problem not in left),
        left=tuple(left),
    )


def _reindex(manifest: ManifestWriter) -> bool:
    """Rebuild the manifest's indexes if they are all that SQLite finds damaged; return True if it succeeded."""
    errors = integrity_errors(manifest)
    if not errors or not all("index" in error for error in errors):
        return False
    try:
        manifest.reindex()
    except StoreDamaged:
        return False
    return True


def _withdraw(manifest: ManifestWriter, problems: Sequence[Problem], shard_size: int) -> list[int]:
    damaged = {
        problem.shard
        for problem in problems
        if problem.shard is not None and problem.kind not in ("orphan", "audit")
    }
    for shard in sorted(damaged):
        manifest.withdraw_shard(shard, range(shard * shard_size, (shard + 1) * shard_size))
    return sorted(damaged)


def _remove_files(store: InspectedStore, shards: Sequence[int], problems: Sequence[Problem]) -> list[str]:
    """Remove the files of withdrawn shards, and unlisted files."""
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


def _rewrite_documents(store: InspectedStore, manifest: ManifestWriter) -> list[str]:
    """Restore every zarr.json that was changed, and the manifest's own copies of them and of the spec."""
    try:
        manifest.spec()
    except StoreDamaged:
        manifest.restore_spec(store.spec)
    try:
        documents = manifest.documents(store.spec)
    except StoreDamaged:
        documents = documents_of(store.spec, manifest.row_count())
        manifest.restore_documents(documents)
    with explain_os_errors(store.path):
        changed = changed_documents(store.path, documents)
        write_documents(store.path, documents)
    return changed
