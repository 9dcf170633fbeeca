"""Stores with a manifest of millions of rows, written quickly: all rows are listed, no embedding exists."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.support.synthetic_store import SHARD_SIZE, synthetic_spec
from mobilesam.store import EmbeddingStore, ImageRef, Selection
from mobilesam.store.checksum import row_digest, shard_digest
from mobilesam.store.layout import MANIFEST

FAILED_EVERY = 10_000
"""Rows per failed row."""


class _Images(Sequence[ImageRef]):
    """Images of the rows, created one at a time: a list of millions would be most of this process's memory."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: Any) -> Any:
        return ImageRef(key=_key(row), size=_size(row))

    def __iter__(self) -> Iterator[ImageRef]:
        return map(self.__getitem__, range(self._rows))


def _key(row: int) -> str:
    """Return the row's key, named and grouped as in SA-1B."""
    return f"sa_{row // 11_186:06d}/sa_{row:08d}.jpg"


def _size(row: int) -> int:
    return 1_000_000 + row % 1000


def make_large_store(
    path: Path, rows: int, *, pending_shards: int, image_size: int, image_root: Path, shard_files: bool
) -> None:
    """Write a store of `rows` rows in shards of 64, all committed but the last `pending_shards`.

    Every checksum in the manifest is right, except those of the embeddings.

    Args:
        path: of the store.
        rows: number of rows.
        pending_shards: shards left uncommitted at the end.
        image_size: side of the encoder's square in pixels.
        image_root: recorded in the spec; may be missing.
        shard_files: make the shards' files, sparse, of full length and without content; else there are none.
    """
    spec, head = synthetic_spec(image_size, image_root)
    everything = Selection(fraction=1.0, seed=0, limit=None, sources=(str(image_root),))
    with EmbeddingStore.create(path, spec, _Images(rows), everything, head) as store:
        shards = store.pending_shards()
        _commit(path, rows, shards[: len(shards) - pending_shards])
        if shard_files:
            _make_shard_files(store, shards[: len(shards) - pending_shards])


def _commit(path: Path, rows: int, shards: Sequence[int]) -> None:
    """Commit shards as `ManifestWriter.commit_shard` does, but all in one transaction without a rollback journal."""
    committed = min(rows, len(shards) * SHARD_SIZE)
    digests = array("I")
    with closing(sqlite3.connect(path / MANIFEST)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = OFF")
        insert = "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        connection.executemany(insert, _results(committed, digests))
        connection.executemany(
            "INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?)",
            (_shard(shard, digests[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]) for shard in shards),
        )
        connection.commit()
    # On the disk, so that a later benchmark can read it from there.
    descriptor = os.open(path / MANIFEST, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _results(rows: int, digests: array[int]) -> Iterator[tuple]:
    """Yield the rows of the table `results`, and append each row's digest to `digests`."""
    for row in range(rows):
        size, reason, sha256, sizes, crc = _size(row), None, None, (1500, 2250, 683, 1024), None
        if row % FAILED_EVERY == FAILED_EVERY - 1:
            reason, sizes = "made to fail", (None, None, None, None)
        else:
            sha256 = hashlib.sha256(b"%d" % row).digest()
            crc = int.from_bytes(sha256[:4], "little")
        learned = (reason, sha256, sha256 and size, *sizes, crc, None, None, None, None)
        digest = row_digest((row, _key(row).encode(), size, None, *learned))
        digests.append(digest)
        yield (row, *learned, digest)


def _shard(shard: int, digests: Sequence[int]) -> tuple:
    first = shard * SHARD_SIZE
    failed = sum(row % FAILED_EVERY == FAILED_EVERY - 1 for row in range(first, first + len(digests)))
    fields = (shard, len(digests), len(digests) - failed, failed, "0123456789ab")
    return (*fields, shard_digest(fields, digests))


def _make_shard_files(store: EmbeddingStore, shards: Sequence[int]) -> None:
    for layout in store.spec.layouts:
        for shard in shards:
            place = store.path / layout.name / layout.file_name(shard)
            with open(place, "wb") as file:
                file.truncate(layout.file_bytes(len(store.shard_rows(shard))))
