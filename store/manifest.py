"""The manifest: SQLite database inside the store that lists its rows, read by anyone and written by one process.

A row's image stays in the table `images` for ever. Its result, as a worker computed it, is in `results` exactly as
long as its shard is in `shards`: committing and withdrawing a shard are one transaction each.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..common.errors import REPAIR_METADATA, REPLACE_MANIFEST, StoreDamaged, StoreError
from ..common.image_ref import ImageRef
from . import database
from .checksum import KeysDigest, row_digest, shard_digest
from .database import (
    SELECT_COMMITTED,
    SELECT_RECORDS,
    decode_record,
    encode_result,
    explain_sqlite_errors,
)
from .records import Audit, Counts, ImageRecord, RowResult, Selection, Status
from .spec import StoreSpec, spec_digest
from .zarr_metadata import document_names

PAGE_KEYS = 10_000
"""Keys or rows read at a time when all are scanned."""

DoneRow = tuple[int, bytes, int, int | None]
"""Row, SHA-256 of the image file (32 bytes), crc32c of the embedding and of its scales (None but in int8 stores)."""


class Manifest:
    """Manifest open for reading. Safe to use from several threads; one statement or transaction at a time.

    Args:
        path: SQLite file.

    Raises:
        StoreDamaged: the file is missing, or is not a manifest.
        StoreError: another version wrote it, or it can't be opened.
    """

    _WRITABLE = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mutex = threading.RLock()
        self._connection = database.connect(path, writable=self._WRITABLE)

    def close(self) -> None:
        """Close the connection, once other threads' statements have ended; the object can't be used afterwards."""
        with self._mutex:
            self._connection.close()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._mutex, explain_sqlite_errors(self.path):
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
        """Let all queries in the context see the same state; a writer can't commit until the context ends."""
        with self._transaction("BEGIN"):
            yield

    def query(self, statement: str, values: Sequence[object] = ()) -> list[tuple]:
        """Return all rows of a SELECT.

        Args:
            statement: SQL text, with placeholders.
            values: values of the placeholders, in order.

        Raises:
            StoreDamaged: the database is damaged.
            StoreError: it can't be read.
        """
        with self._mutex, explain_sqlite_errors(self.path):
            return self._connection.execute(statement, values).fetchall()

    # ---- the store as a whole

    def refuse_foreign(self, spec: StoreSpec) -> None:
        """Raise StoreDamaged unless this manifest belongs to the store that `spec`, from its zarr.json, describes."""
        meta = dict(self.query("SELECT name, value FROM meta"))
        if meta.get("store_id") != spec.store_id:
            raise StoreDamaged(
                f"{self.path} belongs to store {meta.get('store_id')}, zarr.json to {spec.store_id}: "
                "put this store's own manifest back"
            )
        if meta.get("spec_sha256") != spec.digest():
            raise StoreDamaged(
                f"the attributes in zarr.json are not those that {self.path} was made with: {REPAIR_METADATA}"
            )

    def spec(self) -> StoreSpec:
        """Return the manifest's copy of the spec.

        Raises:
            StoreDamaged: the copy was changed.
            StoreError: another version wrote it.
        """
        meta = dict(self.query("SELECT name, value FROM meta"))
        try:
            value = json.loads(meta["spec"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreDamaged(
                f"{self.path} is damaged: its copy of the spec is unreadable; {REPAIR_METADATA}"
            ) from error
        if spec_digest(value) != meta.get("spec_sha256"):
            raise StoreDamaged(f"{self.path} is damaged: its copy of the spec was changed; {REPAIR_METADATA}")
        spec = StoreSpec.from_json(value)
        self.refuse_foreign(spec)
        return spec

    def documents(self, spec: StoreSpec) -> dict[str, bytes]:
        """Return the manifest's copy of every zarr.json, by its path in the store, the group's last.

        Raises:
            StoreDamaged: a copy was changed, or their names are not those of a store with this spec. The names are
                checked since the copies' checksums don't cover them, though they say where to write each copy.
        """
        found = self.query("SELECT name, content, sha256 FROM documents ORDER BY length(name) DESC, name")
        names, expected = {name for name, _, _ in found}, document_names(spec)
        if names != expected:
            differing = ", ".join(sorted(map(repr, names ^ expected)))
            raise StoreDamaged(
                f"{self.path} is damaged: its copies of zarr.json are not this store's (differing: {differing}); "
                f"{REPAIR_METADATA}"
            )
        for name, content, sha256 in found:
            if not isinstance(content, bytes) or hashlib.sha256(content).digest() != sha256:
                raise StoreDamaged(
                    f"{self.path} is damaged: its copy of {name} was changed; {REPAIR_METADATA}"
                )
        return {name: content for name, content, _ in found}

    # ---- rows and shards

    def row_count(self) -> int:
        """Return the number of rows of any status; StoreDamaged when rows are missing."""
        last, appended = self.query(
            "SELECT (SELECT max(row) FROM images), (SELECT coalesce(sum(rows), 0) FROM extensions)"
        )[0]
        count = last + 1 if isinstance(last, int) else 0
        if count != appended:
            raise StoreDamaged(
                f"{self.path} is damaged (its last row is {last}, but {appended} were appended): {REPLACE_MANIFEST}"
            )
        return count

    def counts(self) -> Counts:
        """Return the number of rows by status."""
        done, failed = self.query("SELECT coalesce(sum(done), 0), coalesce(sum(failed), 0) FROM shards")[0]
        return Counts(done=done, failed=failed, pending=self.row_count() - done - failed)

    def committed_shards(self) -> dict[int, int]:
        """Return the number of rows of each committed shard, by shard, ascending."""
        committed = dict(self.query("SELECT shard, rows FROM shards ORDER BY shard"))
        if not all(isinstance(shard, int) for shard in committed):
            raise StoreDamaged(f"{self.path} is damaged (a shard has no number): {REPLACE_MANIFEST}")
        return committed

    def shards_with_failures(self) -> list[int]:
        """Return the committed shards in which at least one image failed, ascending."""
        return [shard for (shard,) in self.query("SELECT shard FROM shards WHERE failed > 0 ORDER BY shard")]

    def keys(self, rows: range) -> list[bytes]:
        """Return the keys of a range of rows, in row order."""
        found = self.query(
            "SELECT key FROM images WHERE row >= ? AND row < ? ORDER BY row", (rows.start, rows.stop)
        )
        return [key for (key,) in found]

    def sorted_keys(self) -> Iterator[bytes]:
        """Yield the key of every row as bytes, ascending; `PAGE_KEYS` at a time are in memory."""
        last = b""
        while page := self.query(
            "SELECT key FROM images WHERE key > ? ORDER BY key LIMIT ?", (last, PAGE_KEYS)
        ):
            for (key,) in page:
                if not isinstance(key, bytes) or key <= last:
                    raise StoreDamaged(
                        f"{self.path} is damaged (its keys are out of order): {REPLACE_MANIFEST}"
                    )
                yield key
                last = key

    def find(self, key: str) -> ImageRecord | None:
        """Return the record of the image with this key; None if there is none."""
        found = self.query("SELECT row FROM images WHERE key = ?", (os.fsencode(key),))
        return self.records(None, range(found[0][0], found[0][0] + 1))[0] if found else None

    def selections(self) -> list[Selection]:
        """Return the selections of the first set of images and of each extension, in order."""
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
                f"{self.path} is damaged (its sets of images: {error}): {REPLACE_MANIFEST}"
            ) from error

    def records(
        self, status: Status | None = "done", rows: range | None = None, limit: int | None = None
    ) -> list[ImageRecord]:
        """Return records in row order.

        Args:
            status: return only rows of this status; None for every status.
            rows: return only rows in this range; None for all rows.
            limit: return at most this many, the first ones; None for all.

        Raises:
            StoreDamaged: a row is not as committed.
        """
        select, where, values = SELECT_RECORDS, ["1"], []
        if status == "pending":
            where.append("results.row IS NULL")
        elif status is not None:
            select = SELECT_COMMITTED
            where.append("reason IS NULL" if status == "done" else "reason IS NOT NULL")
        if rows is not None:
            where.append("row >= ? AND row < ?")
            values += [rows.start, rows.stop]
        values.append(-1 if limit is None else limit)
        found = self.query(f"{select} WHERE {' AND '.join(where)} ORDER BY row LIMIT ?", values)
        return [decode_record(fields) for fields in found]

    def done_rows(self) -> Iterator[list[DoneRow]]:
        """Yield the checksums of all done rows, ascending, `PAGE_KEYS` at a time: 2 microseconds a row.

        Unlike `records`, this doesn't check each row against its own checksum.

        Raises:
            StoreDamaged: a row has something else in place of a checksum.
        """
        last = -1
        while page := self.query(
            "SELECT row, sha256, crc32c, scales_crc32c FROM results WHERE row > ? AND reason IS NULL "
            "ORDER BY row LIMIT ?",
            (last, PAGE_KEYS),
        ):
            for row, sha256, crc, scales_crc in page:
                whole = isinstance(row, int) and isinstance(sha256, bytes) and len(sha256) == 32
                if not (whole and isinstance(crc, int) and isinstance(scales_crc, int | None)):
                    raise StoreDamaged(
                        f"the manifest's row {row} is damaged (it lacks a checksum): remove its shard with mobilesam "
                        "inspect STORE --repair, and compute it again"
                    )
            yield page
            last = page[-1][0]

    def whole_records(
        self, status: Status, rows: range | None = None, limit: int | None = None
    ) -> list[ImageRecord]:
        """Return records as `records` does, without those that are damaged, which a check reports."""
        try:
            return self.records(status, rows, limit)
        except StoreDamaged:
            found: list[ImageRecord] = []
        wanted = "IS NULL" if status == "done" else "IS NOT NULL"
        for (row,) in self.query(f"SELECT row FROM results WHERE reason {wanted} ORDER BY row"):
            if isinstance(row, int) and (rows is None or row in rows) and len(found) != limit:
                with suppress(StoreDamaged):
                    found += self.records(status, range(row, row + 1))
        return found

    def checksums(self, rows: range) -> dict[int, tuple[int, int | None]]:
        """Return the crc32c of the embedding, and of its scales (None except in int8 stores), of every done row in
        the range, by row."""
        found = self.query(
            "SELECT row, crc32c, scales_crc32c FROM results WHERE row >= ? AND row < ? AND reason IS NULL",
            (rows.start, rows.stop),
        )
        return {row: (crc, scales_crc) for row, crc, scales_crc in found}

    def audits(self) -> list[Audit]:
        """Return every audit, in row order."""
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


class ManifestWriter(Manifest):
    """Manifest open for writing, only by the holder of the store's lock. Every change is one transaction."""

    _WRITABLE = True

    @classmethod
    def create(cls, path: Path, spec: StoreSpec) -> ManifestWriter:
        """Make an empty manifest, and open it.

        Args:
            path: place of the SQLite file; nothing is there.
            spec: description of the store, of which the manifest keeps a copy.

        Raises:
            StoreError: it can't be written.
        """
        database.create(path)
        manifest = cls(path)
        manifest.restore_spec(spec)
        return manifest

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    def append(
        self,
        images: Iterable[ImageRef],
        selection: Selection,
        documents: Callable[[int], Mapping[str, bytes]],
    ) -> range:
        """Append the images as the next rows, in the order given.

        Args:
            images: iterated once, while they are inserted.
            selection: rule by which they were chosen.
            documents: function of the store's number of rows that returns every zarr.json, by its path in the store.

        Returns:
            The images' rows.

        Raises:
            StoreError: a key is listed already; nothing was changed.
        """
        chosen = (
            selection.fraction,
            selection.seed,
            selection.limit,
            # Text in SQLite is UTF-8, paths need not be; JSON escapes bytes that are not.
            json.dumps(selection.sources),
            None if selection.checkpoint is None else json.dumps(selection.checkpoint),
        )
        with self._change() as connection:
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

    def relist(self, images: Iterable[ImageRef]) -> None:
        """Update size and offset of the pending rows that have these images' keys."""
        with self._change() as connection:
            connection.executemany(
                'UPDATE images SET size = ?1, "offset" = ?2 WHERE key = ?3 AND (size, "offset") IS NOT (?1, ?2) '
                "AND NOT EXISTS (SELECT 1 FROM results WHERE results.row = images.row)",
                ((image.size, image.offset, os.fsencode(image.key)) for image in images),
            )

    def commit_shard(self, shard: int, attempt: str, results: Sequence[RowResult]) -> None:
        """List a shard, which is not committed yet, and the results of all its rows.

        Args:
            shard: number of the shard.
            attempt: name of the attempt that wrote its files.
            results: one for each row of the shard, in order.

        Raises:
            StoreError: the shard is listed already, or the manifest can't be written; nothing was changed.
        """
        failed = sum(result.reason is not None for result in results)
        shard_fields = (shard, len(results), len(results) - failed, failed, attempt)
        with self._change() as connection:
            images = connection.execute(
                'SELECT row, key, size, "offset" FROM images WHERE row >= ? AND row <= ? ORDER BY row',
                (results[0].row, results[-1].row),
            ).fetchall()
            listed = [
                (*fields, row_digest((*image, *fields[1:])))
                for image, fields in zip(images, map(encode_result, results), strict=True)
            ]
            connection.execute(
                "INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?)",
                (*shard_fields, shard_digest(shard_fields, (fields[-1] for fields in listed))),
            )
            connection.executemany(
                "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", listed
            )

    def withdraw_shard(self, shard: int, rows: range) -> None:
        """Remove a shard from the list: its rows are pending again, and their audits are deleted.

        Args:
            shard: number of the shard; one that is not committed is ignored.
            rows: range of the shard's rows.
        """
        with self._change() as connection:
            connection.execute("DELETE FROM shards WHERE shard = ?", (shard,))
            for table in ("results", "audits"):
                connection.execute(f"DELETE FROM {table} WHERE row >= ? AND row < ?", (rows.start, rows.stop))

    def record_audits(self, audits: Sequence[Audit]) -> None:
        """Record audits of done rows, each replacing an earlier one of its row; StoreError for other rows."""
        with self._change() as connection:
            for audit in audits:
                kept = connection.execute(
                    "INSERT OR REPLACE INTO audits SELECT row, ?, ? FROM results WHERE row = ? AND reason IS NULL",
                    (audit.cosine, audit.relative_mse, audit.row),
                ).rowcount
                if not kept:
                    raise StoreError(f"row {audit.row} of {self.path} is not done, so it can't be audited")

    # ---- repair

    def restore_spec(self, spec: StoreSpec) -> None:
        """Write the manifest's copy of the spec."""
        meta = {
            "store_id": spec.store_id,
            "spec": json.dumps(spec.to_json()),
            "spec_sha256": spec.digest(),
        }
        with self._change() as connection:
            connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta.items())

    def restore_documents(self, documents: Mapping[str, bytes]) -> None:
        """Replace the manifest's copies of the zarr.json files by these, which are keyed by path in the store."""
        with self._change() as connection:
            _replace_documents(connection, documents)

    def reindex(self) -> None:
        """Rebuild the indexes from their tables; StoreDamaged when the tables are damaged themselves."""
        with self._mutex, explain_sqlite_errors(self.path):
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
