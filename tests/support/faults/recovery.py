"""Checks after a fault: nothing is read wrongly, a rerun restores every embedding, nothing is left over."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mobilesam.store import EmbeddingStore, StoreError

_ATTEMPT = re.compile(r"\.[0-9a-f]+\.partial$")


@dataclass(frozen=True)
class Snapshot:
    """Contents of a store: digests of done rows by key, keys of failed images, names of files."""

    rows: Mapping[str, str]
    failed: frozenset[str]
    files: frozenset[str]

    @classmethod
    def of(cls, path: Path) -> Snapshot:
        """Read the whole store; errors of the reader are raised."""
        with EmbeddingStore.open(path) as store:
            rows = {record.key: digest(store, record.row) for record in store.manifest.records("done")}
            failed = frozenset(record.key for record in store.manifest.records("failed"))
        return cls(rows, failed, files_of(path))


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """State of a store after a fault and a rerun, compared with an undisturbed run."""

    missing: list[str]
    """Keys that the undisturbed run has and this store lacks or cannot read."""
    wrong: list[str]
    """Keys that were read as other bytes, before or after the rerun."""
    strays: list[str] = field(default_factory=list)
    """Files that no undisturbed run leaves."""
    orphans: list[int] = field(default_factory=list)
    """Ids of processes that are still running."""

    @property
    def clean(self) -> bool:
        """True if nothing is missing, wrong or left over."""
        return not (self.missing or self.wrong or self.strays or self.orphans)


def rerun_and_compare(
    path: Path,
    undisturbed: Snapshot,
    rerun: Callable[[], object],
    *,
    promised: Collection[str] = (),
    sessions: Collection[int] = (),
) -> Recovery:
    """Read what the store at `path` lists, run `rerun`, and compare with an undisturbed run.

    Args:
        path: Store, which may not exist.
        undisturbed: Snapshot of an undisturbed run's store.
        rerun: Function that runs the same command again.
        promised: Keys whose commit was reported before the fault; they must be listed before the rerun.
        sessions: Session ids (setsid) of the processes that were hit.
    """
    missing = [] if not promised else [key for key in promised if key not in listed_keys(path)]
    wrong = wrong_reads(path, undisturbed)
    rerun()
    return Recovery(
        missing=missing + missing_rows(path, undisturbed),
        wrong=wrong + wrong_reads(path, undisturbed),
        strays=stray_files(path, undisturbed),
        orphans=living_processes(sessions),
    )


def digest(store: EmbeddingStore, row: int) -> str:
    """Return the SHA-256 of a row as it is read: values, scales, shapes, types, and the image if it is kept."""
    batch, state = store.read([row]), hashlib.sha256()
    if store.spec.kept_images is not None:
        state.update(store.read_image(row))
    for array in (batch.values, batch.scales):
        if array is not None:
            state.update(f"{array.dtype.str} {array.shape}".encode())
            state.update(array.tobytes())
    return state.hexdigest()


def listed_keys(path: Path) -> set[str]:
    """Return the keys of done rows in the manifest; empty if the store cannot be opened."""
    try:
        with EmbeddingStore.open(path) as store:
            return {record.key for record in store.manifest.records("done")}
    except StoreError:
        return set()


def wrong_reads(path: Path, undisturbed: Snapshot) -> list[str]:
    """Return keys of rows that are read without an error and differ from the undisturbed run.

    An error of the reader, for a row or the whole store, is not a wrong read.
    """
    wrong = []
    try:
        with EmbeddingStore.open(path) as store:
            for record in store.manifest.records("done"):
                try:
                    found = digest(store, record.row)
                except StoreError:
                    continue
                if undisturbed.rows.get(record.key) != found:
                    wrong.append(record.key)
    except StoreError:
        pass
    return wrong


def missing_rows(path: Path, undisturbed: Snapshot) -> list[str]:
    """Return keys of the undisturbed run's rows that this store does not list as done or cannot read."""
    readable = set()
    try:
        with EmbeddingStore.open(path) as store:
            for record in store.manifest.records("done"):
                try:
                    digest(store, record.row)
                except StoreError:
                    continue
                readable.add(record.key)
    except StoreError:
        pass
    return sorted(undisturbed.rows.keys() - readable)


def stray_files(path: Path, undisturbed: Snapshot) -> list[str]:
    """Return files that the undisturbed store lacks, and partial stores left beside this one."""
    beside = [
        f"../{draft.name}"
        for draft in path.parent.glob(f"{path.name}.*")
        if _ATTEMPT.search(draft.name) or draft.name.endswith(".partial")
    ]
    return sorted(files_of(path) - undisturbed.files) + sorted(beside)


def files_of(path: Path) -> frozenset[str]:
    """Return the names of all files and folders of a store, relative to it."""
    return frozenset(str(file.relative_to(path)) for file in path.rglob("*"))


def processes_with_environment(mark: str) -> list[int]:
    """Return ids of processes whose initial environment contains the text."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return sorted(found)


def living_processes(sessions: Collection[int]) -> list[int]:
    """Return ids of processes of the sessions that are running (not zombies)."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # "pid (name, which may hold anything) state ppid pgrp session ..."
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) in sessions and state != "Z":
            found.append(int(folder.name))
    return sorted(found)
