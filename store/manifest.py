"""The manifest: the one truth about which rows exist, in SQLite inside the store.

A row's image stands in `images` for good. What a worker learned of it stands in `results` exactly as long as
its shard stands in `shards`: committing and withdrawing a shard are one transaction each.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import database
from .digests import KeysDigest, row_digest, shard_digest
from .errors import MAKE_ANEW, PUT_BACK, StoreDamaged, StoreError
from .records import Audit, Counts, ImageRecord, NewImage, RowResult, Selection, Status
from .rows import SELECT_LISTED, SELECT_RECORDS, record_of, result_fields
from .spec import StoreSpec, spec_digest

PAGE_KEYS = 10_000
"""Keys read at once where all of them are gone through."""


class Manifest:
    """One open manifest. Safe to use from several threads; one statement or transaction at a time."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.path = path
        self._mutex = threading.RLock()
        self._connection = database.connect(path, writable=writable)

    @classmethod
    def create(cls, path: Path, spec: StoreSpec) -> Manifest:
        """Make an empty manifest that belongs to the store that `spec` describes."""
        database.create(path)
        manifest = cls(path, writable=True)
        manifest.restore_spec(spec)
        return manifest

    def close(self) -> None:
        """Close the connection, when the statement that another thread is at has ended; the object is of no
        further use."""
        with self._mutex:
            self._connection.close()

    @contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        with self._mutex, database.explained(self.path):
            self._connection.execute(begin)
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk makes SQLite roll back by itself.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Queries inside see one state, whatever a writer does meanwhile; it waits to commit until they are done."""
        with self._transaction("BEGIN"):
            yield

    def query(self, statement: str, values: Sequence[object] = ()) -> list[tuple]:
        """All rows of a SELECT."""
        with self._mutex, database.explained(self.path):
            return self._connection.execute(statement, values).fetchall()

    # ---- the store as a whole

    def refuse_foreign(self, spec: StoreSpec) -> None:
        """StoreDamaged unless this is the manifest of the very store that `spec`, its zarr.json's, describes."""
        meta = dict(self.query("SELECT name, value FROM meta"))
        if meta.get("store_id") != spec.store_id:
            raise StoreDamaged(
                f"{self.path} belongs to store {meta.get('store_id')}, zarr.json to {spec.store_id}: "
                "put this store's own manifest back"
            )
        if meta.get("spec_sha256") != spec.digest():
            raise StoreDamaged(
                f"the attributes in zarr.json are not those that {self.path} was made with: {PUT_BACK}"
            )

    def spec(self) -> StoreSpec:
        """The spec as the manifest keeps it. StoreDamaged when it isn't as written, StoreError when another version
        wrote it."""
        meta = dict(self.query("SELECT name, value FROM meta"))
        try:
            value = json.loads(meta["spec"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreDamaged(
                f"{self.path} is damaged: its copy of the spec is unreadable; {PUT_BACK}"
            ) from error
        if spec_digest(value) != meta.get("spec_sha256"):
            raise StoreDamaged(f"{self.path} is damaged: its copy of the spec is not as written; {PUT_BACK}")
        spec = StoreSpec.from_json(value)
        self.refuse_foreign(spec)
        return spec

    def restore_spec(self, spec: StoreSpec) -> None:
        """Write down what store this is the manifest of."""
        meta = {
            "store_id": spec.store_id,
            "spec": json.dumps(spec.to_json()),
            "spec_sha256": spec.digest(),
        }
        with self._transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta.items())

    def documents(self) -> dict[str, bytes]:
        """Every zarr.json as it must be, by its path in the store, the group's last; StoreDamaged when one isn't
        as written here."""
        found = self.query("SELECT name, content, sha256 FROM documents ORDER BY length(name) DESC, name")
        for name, content, sha256 in found:
            if not isinstance(content, bytes) or hashlib.sha256(content).digest() != sha256:
                raise StoreDamaged(
                    f"{self.path} is damaged: its copy of {name} is not as written; {PUT_BACK}"
                )
        return {name: content for name, content, _ in found}

    def restore_documents(self, documents: Mapping[str, bytes]) -> None:
        """Keep these documents in place of all others."""
        with self._transaction() as connection:
            _replace_documents(connection, documents)

    # ---- reading

    def row_count(self) -> int:
        """How many rows the store has, whatever their status."""
        last, appended = self.query(
            "SELECT (SELECT max(row) FROM images), (SELECT coalesce(sum(rows), 0) FROM extensions)"
        )[0]
        count = last + 1 if isinstance(last, int) else 0
        if count != appended:
            raise StoreDamaged(
                f"{self.path} is damaged (its last row is {last}, but {appended} were appended): {MAKE_ANEW}"
            )
        return count

    def counts(self) -> Counts:
        """Rows by status."""
        done, failed = self.query("SELECT coalesce(sum(done), 0), coalesce(sum(failed), 0) FROM shards")[0]
        return Counts(done=done, failed=failed, pending=self.row_count() - done - failed)

    def committed_shards(self) -> dict[int, int]:
        """Every committed shard with the number of rows that it was committed with."""
        committed = dict(self.query("SELECT shard, rows FROM shards ORDER BY shard"))
        if not all(isinstance(shard, int) for shard in committed):
            raise StoreDamaged(f"{self.path} is damaged (a shard has no number): {MAKE_ANEW}")
        return committed

    def shards_with_failures(self) -> list[int]:
        """Committed shards in which at least one image failed."""
        return [shard for (shard,) in self.query("SELECT shard FROM shards WHERE failed > 0 ORDER BY shard")]

    def keys(self, rows: range) -> list[bytes]:
        """The keys of a range of rows, in row order."""
        found = self.query(
            "SELECT key FROM images WHERE row >= ? AND row < ? ORDER BY row", (rows.start, rows.stop)
        )
        return [key for (key,) in found]

    def sorted_keys(self) -> Iterator[bytes]:
        """The key of every row, as bytes, ascending; a few at a time are in memory."""
        last = b""
        while page := self.query(
            "SELECT key FROM images WHERE key > ? ORDER BY key LIMIT ?", (last, PAGE_KEYS)
        ):
            for (key,) in page:
                if not isinstance(key, bytes) or key <= last:
                    raise StoreDamaged(f"{self.path} is damaged (its keys are out of order): {MAKE_ANEW}")
                yield key
                last = key

    def selections(self) -> list[Selection]:
        """How the first set of images and each extension were chosen, in order."""
        found = self.query(
            'SELECT fraction, seed, "limit", sources, checkpoint FROM extensions ORDER BY first_row'
        )
        try:
            return [
                Selection(
                    fraction=fraction,
                    seed=seed,
                    limit=limit,
                    sources=tuple(json.loads(sources)),
                    checkpoint=None if checkpoint is None else json.loads(checkpoint),
                )
                for fraction, seed, limit, sources, checkpoint in found
            ]
        except (TypeError, ValueError) as error:
            raise StoreDamaged(
                f"{self.path} is damaged (its sets of images: {error}): {MAKE_ANEW}"
            ) from error

    def records(self, status: Status | None = None, rows: range | None = None) -> list[ImageRecord]:
        """Records in row order: those of one status, or all; of a range of rows, or all. StoreDamaged when one
        is not as it was committed."""
        select, where, values = SELECT_RECORDS, ["1"], []
        if status == "pending":
            where.append("results.row IS NULL")
        elif status is not None:
            select = SELECT_LISTED
            where.append("reason IS NULL" if status == "done" else "reason IS NOT NULL")
        if rows is not None:
            where.append("row >= ? AND row < ?")
            values += [rows.start, rows.stop]
        found = self.query(f"{select} WHERE {' AND '.join(where)} ORDER BY row", values)
        return [record_of(fields) for fields in found]

    def checksums(self, rows: range) -> dict[int, tuple[int, int | None]]:
        """crc32c of the payload, and of the scales where there are any, of every done row in the range."""
        found = self.query(
            "SELECT row, crc32c, scales_crc32c FROM results WHERE row >= ? AND row < ? AND reason IS NULL",
            (rows.start, rows.stop),
        )
        return {row: (crc, scales_crc) for row, crc, scales_crc in found}

    def audits(self) -> list[Audit]:
        """Every audit, in row order."""
        return [
            # SQLite keeps NaN as NULL.
            Audit(
                row=row,
                cosine=math.nan if cosine is None else cosine,
                relative_mse=math.nan if relative_mse is None else relative_mse,
            )
            for row, cosine, relative_mse in self.query(
                "SELECT row, cosine, relative_mse FROM audits ORDER BY row"
            )
        ]

    # ---- writing

    def append(
        self,
        images: Iterable[NewImage],
        selection: Selection,
        documents: Callable[[int], Mapping[str, bytes]],
    ) -> range:
        """Give the images the next rows, in the order given; their range. `documents` gives every zarr.json for a
        number of rows."""
        chosen = (
            selection.fraction,
            selection.seed,
            selection.limit,
            # Text in SQLite is UTF-8, paths need not be; JSON escapes what isn't.
            json.dumps(selection.sources),
            None if selection.checkpoint is None else json.dumps(selection.checkpoint),
        )
        with self._transaction() as connection:
            first = row = self.row_count()
            digest = KeysDigest((first, *chosen))

            def fields() -> Iterator[tuple]:
                nonlocal row
                for image in images:
                    key = os.fsencode(image.key)
                    digest.add(key)
                    yield row, key, image.size, image.offset
                    row += 1

            connection.executemany("INSERT INTO images VALUES (?, ?, ?, ?)", fields())
            connection.execute(
                "INSERT INTO extensions VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (first, row - first, *chosen, digest.value()),
            )
            _replace_documents(connection, documents(row))
        return range(first, row)

    def relist(self, images: Iterable[NewImage]) -> None:
        """Update size and offset of pending rows by key."""
        with self._transaction() as connection:
            connection.executemany(
                'UPDATE images SET size = ?1, "offset" = ?2 WHERE key = ?3 AND (size, "offset") IS NOT (?1, ?2) '
                "AND NOT EXISTS (SELECT 1 FROM results WHERE results.row = images.row)",
                ((image.size, image.offset, os.fsencode(image.key)) for image in images),
            )

    def commit_shard(self, shard: int, attempt: str, results: Sequence[RowResult]) -> None:
        """List a shard and all its rows; the shard must not be listed already."""
        failed = sum(result.reason is not None for result in results)
        shard_fields = (shard, len(results), len(results) - failed, failed, attempt)
        with self._transaction() as connection:
            images = connection.execute(
                'SELECT row, key, size, "offset" FROM images WHERE row >= ? AND row <= ? ORDER BY row',
                (results[0].row, results[-1].row),
            ).fetchall()
            listed = [
                (*fields, row_digest((*image, *fields[1:])))
                for image, fields in zip(images, map(result_fields, results), strict=True)
            ]
            connection.execute(
                "INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?)",
                (*shard_fields, shard_digest(shard_fields, (fields[-1] for fields in listed))),
            )
            connection.executemany(
                "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", listed
            )

    def withdraw_shard(self, shard: int, rows: range) -> None:
        """Unlist a shard: its rows are pending again, their audits forgotten."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM shards WHERE shard = ?", (shard,))
            for table in ("results", "audits"):
                connection.execute(f"DELETE FROM {table} WHERE row >= ? AND row < ?", (rows.start, rows.stop))

    def record_audits(self, audits: Sequence[Audit]) -> None:
        """Keep audits of done rows, each in place of an earlier one of its row. StoreError for another row."""
        with self._transaction() as connection:
            for audit in audits:
                kept = connection.execute(
                    "INSERT OR REPLACE INTO audits SELECT row, ?, ? FROM results WHERE row = ? AND reason IS NULL",
                    (audit.cosine, audit.relative_mse, audit.row),
                ).rowcount
                if not kept:
                    raise StoreError(
                        f"row {audit.row} of {self.path} is not done: it can't have been audited"
                    )

    def reindex(self) -> None:
        """Build the indexes anew from their tables; StoreDamaged when these are damaged themselves."""
        with self._mutex, database.explained(self.path):
            try:
                self._connection.execute("REINDEX")
            except sqlite3.IntegrityError as error:
                raise StoreDamaged(f"{self.path} is damaged: it lists a key twice") from error


def _replace_documents(connection: sqlite3.Connection, documents: Mapping[str, bytes]) -> None:
    connection.execute("DELETE FROM documents")
    connection.executemany(
        "INSERT INTO documents VALUES (?, ?, ?)",
        ((name, content, hashlib.sha256(content).digest()) for name, content in documents.items()),
    )
