"""Mutations of the package: each removes one safeguard, which the suite must notice.

Each function takes `setattr`, or pytest's monkeypatch.setattr.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from typing import Any

Patch = Callable[[Any, str, Any], None]


class MatchesAll(int):
    """Checksum that equals every other number."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def no_file_sync(patch: Patch) -> None:
    """Rename files without syncing them first."""
    plain = os.fsync
    patch(os, "fsync", lambda file: None if _is_file(file) else plain(file))


def no_folder_sync(patch: Patch) -> None:
    """Do not sync the folder after a rename."""
    plain = os.fsync
    patch(os, "fsync", lambda file: plain(file) if _is_file(file) else None)


def no_checksum(patch: Patch) -> None:
    """Read rows without comparing their bytes with a checksum."""
    from mobilesam.store import reader

    plain = reader.crc32c
    patch(reader, "crc32c", lambda payload: MatchesAll(plain(payload)))


def no_identity(patch: Patch) -> None:
    """Read intact bytes without checking that they were committed for this row."""
    from mobilesam.store.reader import ShardFile

    plain = ShardFile.__init__

    def changed(self: Any, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        self.checksums = {row: MatchesAll(checksum) for row, checksum in self.checksums.items()}

    patch(ShardFile, "__init__", changed)


def listed_first(patch: Patch) -> None:
    """List a shard before its file is in place."""
    from mobilesam.store import EmbeddingStore

    plain = EmbeddingStore.commit

    def changed(self: Any, shard: int, attempt: str, results: Sequence[Any]) -> None:
        self.manifest.commit_shard(shard, attempt, results)
        self.manifest.commit_shard = lambda *_: None
        try:
            plain(self, shard, attempt, results)
        finally:
            del self.manifest.commit_shard

    patch(EmbeddingStore, "commit", changed)


def written_in_place(patch: Patch) -> None:
    """Write a checkpoint over the last one, and keep no previous one."""
    from mobilesam.distill import checkpoint

    def write(path: Any, data: bytes) -> None:
        path.with_name("previous.pt").unlink(missing_ok=True)
        final = path.with_name("last.pt")
        with open(final, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            file.write(data[len(data) // 2 :])
        path.write_bytes(data)

    patch(checkpoint, "write_atomic", write)


MUTATIONS = {
    mutation.__name__: mutation
    for mutation in (no_file_sync, no_folder_sync, no_checksum, no_identity, listed_first, written_in_place)
}


def _is_file(file: Any) -> bool:
    descriptor = file if isinstance(file, int) else file.fileno()
    return stat.S_ISREG(os.fstat(descriptor).st_mode)
