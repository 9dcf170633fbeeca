"""The package with one safeguard left out: the suite must notice each of these.

Each function takes `setattr`, or pytest's monkeypatch.setattr.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from typing import Any

Patch = Callable[[Any, str, Any], None]


class Unchecked(int):
    """A checksum that no other number differs from."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def no_file_sync(patch: Patch) -> None:
    """Files are renamed without having been synced."""
    plain = os.fsync
    patch(os, "fsync", lambda file: None if _is_file(file) else plain(file))


def no_folder_sync(patch: Patch) -> None:
    """Names are not synced after a rename."""
    plain = os.fsync
    patch(os, "fsync", lambda file: plain(file) if _is_file(file) else None)


def no_checksum(patch: Patch) -> None:
    """The reader compares a row's bytes with no checksum."""
    from mobilesam.store import reader

    plain = reader.crc32c
    patch(reader, "crc32c", lambda payload: Unchecked(plain(payload)))


def no_identity(patch: Patch) -> None:
    """The reader takes whole bytes for those that were committed for the row."""
    from mobilesam.store.reader import ShardFile

    plain = ShardFile.__init__

    def changed(self: Any, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        self.checksums = {row: Unchecked(checksum) for row, checksum in self.checksums.items()}

    patch(ShardFile, "__init__", changed)


def listed_first(patch: Patch) -> None:
    """A shard is listed before it is in its place."""
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
    """A checkpoint is written over the last one, and none is kept."""
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
