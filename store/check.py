"""Everything in a store against its manifest, many shards at a time."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from ..common.durable import explain_os_errors
from ..common.errors import StoreDamaged
from .audit import tolerance
from .check_shard import Finding, check_shard, manifest_problems, shard_listing
from .images import FOLDER
from .layout import HEAD, PRIVATE, ArrayLayout, rows_of
from .lock import WriterLock
from .manifest import Manifest
from .records import Problem
from .sam_head import read_head
from .spec import StoreSpec
from .zarr_metadata import changed_documents

GROUP_SHARDS = 32
"""Shards that are read before progress is told; a thread holds one row of one of them in memory."""

LOOKS = 20
LOOK_SECONDS = 0.1
"""How often, and how far apart, a live writer's documents are looked at before they count as damaged."""

Tell = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class OpenStore:
    """A store as the check sees it; `own_lock` when the caller is its writer."""

    path: Path
    spec: StoreSpec
    manifest: Manifest
    own_lock: bool = False

    def writer(self) -> dict | None:
        """Host and pid of another live writer; None when there is none."""
        return None if self.own_lock else WriterLock(self.path / PRIVATE).live_owner()


def quick_problems(store: OpenStore) -> list[Problem]:
    """What can be told at once: documents, head and audits."""
    return [*_document_problems(store), *_head_problems(store), *_audit_problems(store)]


def full_problems(store: OpenStore, progress: Tell | None) -> list[Problem]:
    """Everything: each committed shard is read whole. `progress` hears of (rows read, rows committed)."""
    found = manifest_problems(store.manifest, store.spec.shard_size)
    if is_past_trust(found):
        return found
    known = {problem.shard for problem in found}
    shards = _name_owners(store, list(_shard_findings(store, progress)))
    found += [problem for problem in shards if problem.shard not in known]
    return [*found, *_orphan_problems(store), *quick_problems(store)]


def is_past_trust(problems: Sequence[Problem]) -> bool:
    """Whether the manifest is damaged as a whole, so that what it says of files would be noise, or worse."""
    return any(problem.kind == "listing" and problem.shard is None for problem in problems)


def _shard_findings(store: OpenStore, progress: Tell | None) -> Iterator[Finding]:
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


def _check_committed(store: OpenStore, shard: int) -> list[Finding]:
    """What is wrong with a shard while one and the same commit of it was listed."""
    while listing := shard_listing(store.manifest, shard, store.spec.shard_size):
        found = check_shard(store.path, store.spec, listing)
        if not found:
            return []
        again = shard_listing(store.manifest, shard, store.spec.shard_size)
        if again and again.attempt == listing.attempt:
            return found
    return []


def _name_owners(store: OpenStore, findings: Sequence[Finding]) -> list[Problem]:
    """The problems; those of rows with whole bytes that aren't theirs say whose these are, where a row of this
    store is listed with their checksum."""
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


def _orphan_problems(store: OpenStore) -> list[Problem]:
    """Files that nothing lists. A live writer may be at work on them: then none is told."""
    found = list(_orphans(store)) if store.writer() is None else []
    # A writer may have come, and gone, meanwhile.
    if not found or store.writer() is not None:
        return []
    committed = store.manifest.committed_shards()
    return [
        problem
        for problem in found
        if problem.shard not in committed and problem.file and os.path.lexists(problem.file)
    ]


def _orphans(store: OpenStore) -> Iterator[Problem]:
    with explain_os_errors(store.path):
        for path in partial_files(store.path, store.spec.layouts):
            yield Problem(
                kind="orphan", message="a file that was cut short, and that nothing lists", file=str(path)
            )
        committed = store.manifest.committed_shards()
        for shard, path in unlisted_shards(store.path, store.spec.layouts, committed):
            yield Problem(
                kind="orphan",
                message="a shard's file, though the shard isn't listed",
                file=str(path),
                shard=shard,
            )


def _document_problems(store: OpenStore) -> Iterator[Problem]:
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
        message = "it is not as written: other Zarr readers may be misled, or find no store"
        yield Problem(kind="metadata", message=message, file=str(store.path / name))


def _changed(store: OpenStore) -> list[str]:
    with explain_os_errors(store.path):
        return changed_documents(store.path, store.manifest.documents())


def _head_problems(store: OpenStore) -> Iterator[Problem]:
    path = store.path / HEAD
    try:
        read_head(path, store.spec.head_sha256)
    except StoreDamaged as error:
        yield Problem(kind="head", message=str(error), file=str(path))


def _audit_problems(store: OpenStore) -> Iterator[Problem]:
    limits = tolerance(store.spec.dtype, store.spec.precision)
    for audit in store.manifest.audits():
        if not limits.missed_by(audit):
            continue
        rows = store.manifest.query("SELECT key FROM images WHERE row = ?", (audit.row,))
        yield Problem(
            kind="audit",
            message=f"a fresh run of the teacher gave cosine {audit.cosine:.6f} and relative MSE "
            f"{audit.relative_mse:.3g}, past {limits.cosine:g} and {limits.relative_mse:g}: make the store again "
            "with --precision float32 or a finer --dtype",
            shard=audit.row // store.spec.shard_size,
            row=audit.row,
            key=os.fsdecode(rows[0][0]) if rows else None,
        )


# --- Files in a store that no listing speaks of: attempts that came to nothing. Other people's files are not ours.

_DOCUMENT = re.compile(r"zarr\.json\.[0-9a-f]{8}\.partial")
_TAR = re.compile(r"(0|[1-9]\d*)\.tar")
_PARTIAL_TAR = re.compile(r"\d+\.tar\.[^.]+\.partial")
_PRIVATE = re.compile(r"(writer\.json|sam_head\.safetensors)\.[0-9a-f]{8}\.partial")


def partial_files(store: Path, layouts: Sequence[ArrayLayout]) -> Iterator[Path]:
    """What writing leaves behind when it is cut short. With a live writer it may be at work on them."""
    yield from _matching(store, _DOCUMENT)
    yield from _matching(store / PRIVATE, _PRIVATE)
    yield from _matching(store / FOLDER, _PARTIAL_TAR)
    for layout in layouts:
        zeros = r"\.0" * len(layout.item_shape)
        attempt = re.compile(rf"c\.\d+{zeros}\.[^.]+\.partial|{_DOCUMENT.pattern}")
        yield from _matching(store / layout.name, attempt)


def unlisted_shards(
    store: Path, layouts: Sequence[ArrayLayout], listed: Container[int]
) -> Iterator[tuple[int, Path]]:
    """Shard files, with their number, that are in their place though no listing says so: a writer was killed
    before it listed them, or the shard was withdrawn."""
    for layout in layouts:
        zeros = r"\.0" * len(layout.item_shape)
        for path in _matching(store / layout.name, re.compile(rf"c\.(0|[1-9]\d*){zeros}")):
            shard = int(path.name.split(".")[1])
            if shard not in listed:
                yield shard, path
    for path in _matching(store / FOLDER, _TAR):
        if int(path.stem) not in listed:
            yield int(path.stem), path


def _matching(folder: Path, pattern: re.Pattern[str]) -> Iterator[Path]:
    """Files of the folder whose whole name matches."""
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return
    with entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                yield folder / entry.name
