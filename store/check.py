"""Integrity check of a store: the manifest against itself, files against the manifest, many shards at a time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..common.durable import explain_os_errors
from ..common.errors import REPLACE_MANIFEST, StoreDamaged
from .audit_limits import tolerance
from .check_shard import Finding, check_shard, shard_listing
from .checksum import KeysDigest
from .layout import HEAD, PRIVATE, rows_of
from .lock import WriterLock
from .manifest import PAGE_KEYS, Manifest, ManifestWriter
from .records import Problem
from .sam_head import read_head
from .spec import StoreSpec
from .writer import partial_files, unlisted_shards
from .zarr_metadata import changed_documents

GROUP_SHARDS = 32
"""Shards that are read between two reports of progress; each thread holds one row in memory."""

LOOKS = 20
LOOK_SECONDS = 0.1
"""While a writer is alive, a changed zarr.json is read up to `LOOKS` more times, `LOOK_SECONDS` apart, before it
counts as damaged: the writer may be extending the store."""

SHOWN_ERRORS = 10
"""Most lines of SQLite's integrity check that a problem's message quotes."""

ProgressCallback = Callable[[int, int], None]
"""Function called with the number of rows checked so far, and the number of committed rows in all."""


@dataclass(frozen=True, kw_only=True)
class InspectedStore:
    """Parts of an open store that the checks need; the caller is its writer if the manifest is writable."""

    path: Path
    spec: StoreSpec
    manifest: Manifest

    def writer(self) -> dict[str, Any] | None:
        """Return host and pid of another live writer; None when there is none."""
        if isinstance(self.manifest, ManifestWriter):
            return None
        return WriterLock(self.path / PRIVATE).live_owner()


def quick_problems(store: InspectedStore) -> list[Problem]:
    """Return the problems of the zarr.json files, the head and the audits, which are found without reading shards."""
    return [*_document_problems(store), *_head_problems(store), *_audit_problems(store)]


def full_problems(store: InspectedStore, progress: ProgressCallback | None) -> list[Problem]:
    """Check everything; every committed shard is read whole, in threads.

    Args:
        store: store to check.
        progress: called after each `GROUP_SHARDS` shards; None to report nothing.

    Returns:
        All problems; only the manifest's own if the manifest is damaged as a whole, since files can't be compared
        with it then.

    Raises:
        StoreError: files can't be read for a reason other than damage, such as permissions.
    """
    found = _manifest_problems(store.manifest, store.spec.shard_size)
    if manifest_is_damaged(found):
        return found
    known = {problem.shard for problem in found}
    shards = _name_owners(store, list(_shard_findings(store, progress)))
    found += [problem for problem in shards if problem.shard not in known]
    return [*found, *_orphan_problems(store), *quick_problems(store)]


def manifest_is_damaged(problems: Sequence[Problem]) -> bool:
    """Return True if the manifest is damaged as a whole, so that no file can be compared with it."""
    return any(problem.kind == "listing" and problem.shard is None for problem in problems)


def _shard_findings(store: InspectedStore, progress: ProgressCallback | None) -> Iterator[Finding]:
    import dask

    count = store.manifest.row_count()
    rows = {
        shard: len(rows_of(shard, store.spec.shard_size, count))
        for shard in store.manifest.committed_shards()
    }
    total, done = sum(rows.values()), 0
    check = dask.delayed(partial(_check_committed, store), pure=False)
    waiting = iter(rows)
    while group := list(islice(waiting, GROUP_SHARDS)):
        for findings in dask.compute(*map(check, group), scheduler="threads"):
            yield from findings
        done += sum(rows[shard] for shard in group)
        if progress:
            progress(done, total)


def _check_committed(store: InspectedStore, shard: int) -> list[Finding]:
    """Return the problems of a shard. If it was committed again while its files were read, check it again."""
    while listing := shard_listing(store.manifest, shard, store.spec.shard_size):
        found = check_shard(store.path, store.spec, listing)
        if not found:
            return []
        again = shard_listing(store.manifest, shard, store.spec.shard_size)
        if again and again.attempt == listing.attempt:
            return found
    return []


def _name_owners(store: InspectedStore, findings: Sequence[Finding]) -> list[Problem]:
    """Return the findings' problems. If a row holds intact bytes of another row of this store, its message names that
    row, which is found by its checksum."""
    owners: dict[str, Mapping[int, int]] = {}
    for array, column in (("embeddings", "crc32c"), ("scales", "scales_crc32c")):
        wanted = sorted(
            {finding.foreign[1] for finding in findings if finding.foreign and finding.foreign[0] == array}
        )
        owners[array] = dict(
            store.manifest.query(
                f"SELECT {column}, min(row) FROM results WHERE {column} IN (SELECT value FROM json_each(?)) "
                f"GROUP BY {column}",
                (json.dumps(wanted),),
            )
            if wanted
            else ()
        )
    problems = []
    for finding in findings:
        owner = owners[finding.foreign[0]].get(finding.foreign[1]) if finding.foreign else None
        problem = finding.problem
        if owner is not None:
            problem = replace(problem, message=f"{problem.message}; they are those of row {owner}")
        problems.append(problem)
    return problems


def _orphan_problems(store: InspectedStore) -> list[Problem]:
    """Return the files of no committed shard; none while a writer is alive, since it may be writing them."""
    found = list(_orphans(store)) if store.writer() is None else []
    # A writer may have started, and ended, meanwhile.
    if not found or store.writer() is not None:
        return []
    committed = store.manifest.committed_shards()
    return [
        problem
        for problem in found
        if problem.shard not in committed and problem.file and os.path.lexists(problem.file)
    ]


def _orphans(store: InspectedStore) -> Iterator[Problem]:
    with explain_os_errors(store.path):
        for path in partial_files(store.path, store.spec.layouts):
            yield Problem(
                kind="orphan", message="a partial file left by an interrupted attempt", file=str(path)
            )
        committed = store.manifest.committed_shards()
        for shard, path in unlisted_shards(store.path, store.spec.layouts, committed):
            yield Problem(
                kind="orphan",
                message="the file of a shard that is not committed",
                file=str(path),
                shard=shard,
            )


def _document_problems(store: InspectedStore) -> Iterator[Problem]:
    try:
        store.manifest.spec()
        changed = _changed(store)
        for _ in range(LOOKS):
            if not changed or store.writer() is None:
                break
            time.sleep(LOOK_SECONDS)  # it may be extending the store
            changed = _changed(store)
    except StoreDamaged as error:
        yield Problem(kind="metadata", message=str(error), file=str(store.manifest.path))
        return
    for name in changed:
        message = "its content was changed: other Zarr readers may be misled, or find no store"
        yield Problem(kind="metadata", message=message, file=str(store.path / name))


def _changed(store: InspectedStore) -> list[str]:
    with explain_os_errors(store.path):
        return changed_documents(store.path, store.manifest.documents(store.spec))


def _head_problems(store: InspectedStore) -> Iterator[Problem]:
    path, sha256 = store.path / HEAD, store.spec.head_sha256
    if sha256 is None:
        return
    try:
        read_head(path, sha256)
    except StoreDamaged as error:
        yield Problem(kind="head", message=str(error), file=str(path))


def _audit_problems(store: InspectedStore) -> Iterator[Problem]:
    limits = tolerance(store.spec.dtype, store.spec.precision)
    for audit in store.manifest.audits():
        if not limits.missed_by(audit):
            continue
        rows = store.manifest.query("SELECT key FROM images WHERE row = ?", (audit.row,))
        yield Problem(
            kind="audit",
            message=f"a fresh run of the teacher gave cosine {audit.cosine:.6f} and relative MSE "
            f"{audit.relative_mse:.3g}, outside the limits {limits.cosine:g} and {limits.relative_mse:g}: make the "
            "store again with --precision float32 or a finer --dtype",
            shard=audit.row // store.spec.shard_size,
            row=audit.row,
            key=os.fsdecode(rows[0][0]) if rows else None,
        )


# ---- the manifest against itself


def _manifest_problems(manifest: Manifest, shard_size: int) -> list[Problem]:
    """Return the problems of the manifest's tables as a whole, reading all of them.

    A problem without a shard can't be repaired by recomputing shards.
    """
    try:
        found = [*_database_problems(manifest), *_image_problems(manifest)]
        return [*found, *_stray_problems(manifest, shard_size)]
    except StoreDamaged as error:
        return [_manifest_problem(manifest, str(error))]


def _manifest_problem(manifest: Manifest, message: str, shard: int | None = None) -> Problem:
    return Problem(kind="listing", message=message, file=str(manifest.path), shard=shard)


def integrity_errors(manifest: Manifest) -> list[str]:
    """Return the errors that SQLite's integrity check reports, up to `SHOWN_ERRORS`; it reads the whole database."""
    lines = [line for (line,) in manifest.query(f"PRAGMA integrity_check({SHOWN_ERRORS})")]
    return [] if lines == ["ok"] else lines


def _database_problems(manifest: Manifest) -> Iterator[Problem]:
    lines = integrity_errors(manifest)
    if lines:
        yield _manifest_problem(manifest, f"SQLite reports damage ({'; '.join(lines)}): {REPLACE_MANIFEST}")


def _image_problems(manifest: Manifest) -> Iterator[Problem]:
    """Check that the row numbers have no gap, and that every set of images still has the keys that were appended."""
    manifest.row_count()
    for first, rows, *chosen, digest in manifest.query(
        'SELECT first_row, rows, fraction, seed, "limit", sources, checkpoint, digest FROM extensions'
    ):
        if not isinstance(first, int) or not isinstance(rows, int):
            yield _manifest_problem(
                manifest, f"the row numbers of a set of images are missing: {REPLACE_MANIFEST}"
            )
            continue
        keys = KeysDigest((first, *chosen))
        count = 0
        for start in range(first, first + rows, PAGE_KEYS):
            for key in manifest.keys(range(start, min(start + PAGE_KEYS, first + rows))):
                if isinstance(key, bytes):
                    keys.add(key)
                count += 1
        if count != rows or keys.value() != digest:
            yield _manifest_problem(
                manifest,
                f"the {rows:,} keys from row {first:,} on are not those that were appended: {REPLACE_MANIFEST}",
            )


def _stray_problems(manifest: Manifest, shard_size: int) -> Iterator[Problem]:
    """Find results whose shard isn't listed, and listed shards that have no rows."""
    for (shard,) in manifest.query(
        "SELECT DISTINCT row / ?1 FROM results WHERE row / ?1 NOT IN (SELECT shard FROM shards)",
        (shard_size,),
    ):
        yield _manifest_problem(
            manifest, "rows of this shard have results, though the shard is not listed", shard
        )
    for (shard,) in manifest.query(
        "SELECT shard FROM shards WHERE shard < 0 OR shard * ? >= (SELECT sum(rows) FROM extensions)",
        (shard_size,),
    ):
        yield _manifest_problem(manifest, "this shard is listed, though the store has no rows in it", shard)
