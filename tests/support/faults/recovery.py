"""What must hold after a fault: nothing wrong is read, a rerun gives every embedding back, nothing is left behind."""

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
    """A store as an undisturbed run leaves it: by key, the digest of each done row as our reader gives it; the keys
    of failed images; the names of its files."""

    rows: Mapping[str, str]
    failed: frozenset[str]
    files: frozenset[str]

    @classmethod
    def of(cls, path: Path) -> Snapshot:
        """Read the store whole; every error of the reader comes through."""
        with EmbeddingStore.open(path) as store:
            rows = {record.key: digest(store, record.row) for record in store.manifest.records("done")}
            failed = frozenset(record.key for record in store.manifest.records("failed"))
        return cls(rows, failed, files_of(path))


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What came of a fault and the rerun after it. `missing` are keys that an undisturbed run has and this store
    lacks or can't read; `wrong` keys that were read, before or after the rerun, as other bytes; `strays` files that
    no undisturbed run leaves; `orphans` processes that live on."""

    missing: list[str]
    wrong: list[str]
    strays: list[str] = field(default_factory=list)
    orphans: list[int] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing is amiss."""
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

    `promised` are keys whose commit was reported before the fault: they must be listed already before the rerun.
    `sessions` are ids of the sessions (setsid) that the processes which were hit lived in.
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
    """SHA-256 of a row as it is read: values, scales, shapes and types, and the image where the store keeps it."""
    batch, state = store.read([row]), hashlib.sha256()
    if store.spec.kept_images is not None:
        state.update(store.read_image(row))
    for array in (batch.values, batch.scales):
        if array is not None:
            state.update(f"{array.dtype.str} {array.shape}".encode())
            state.update(array.tobytes())
    return state.hexdigest()


def listed_keys(path: Path) -> set[str]:
    """Keys of the rows that the manifest lists as done; none when no store can be opened."""
    try:
        with EmbeddingStore.open(path) as store:
            return {record.key for record in store.manifest.records("done")}
    except StoreError:
        return set()


def wrong_reads(path: Path, undisturbed: Snapshot) -> list[str]:
    """Keys of listed rows that are read without an error as other bytes than those of the undisturbed run.

    An error of the reader is no wrong read, whether of the whole store or of a row.
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
    """Keys of the undisturbed run's rows that this store doesn't list as done or can't read."""
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
    """Files in the store that the undisturbed one lacks, and drafts of it that were left beside it."""
    beside = [
        f"../{draft.name}"
        for draft in path.parent.glob(f"{path.name}.*")
        if _ATTEMPT.search(draft.name) or draft.name.endswith(".partial")
    ]
    return sorted(files_of(path) - undisturbed.files) + sorted(beside)


def files_of(path: Path) -> frozenset[str]:
    """Names of all files and folders of a store, relative to it."""
    return frozenset(str(file.relative_to(path)) for file in path.rglob("*"))


def processes_with_environment(mark: str) -> list[int]:
    """Processes that are alive and have the text in the environment that they were started with."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return sorted(found)


def living_processes(sessions: Collection[int]) -> list[int]:
    """Processes that are alive (no zombies) in one of the sessions."""
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
