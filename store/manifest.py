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

from ..common.errors import REPAIR_METADATA, REPLACE_MANIFEST, StoreDamaged, StoreError
from ..common.image_ref import ImageRef
from . import database
from .layout import crc32c
from .records import Audit, Counts, ImageRecord, KeptImage, RowResult, Selection, Status
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
        with self._mutex, database.explain_sqlite_errors(self.path):
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
        with self._mutex, database.explain_sqlite_errors(self.path):
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
                f"the attributes in zarr.json are not those that {self.path} was made with: {REPAIR_METADATA}"
            )

    def spec(self) -> StoreSpec:
        """The spec as the manifest keeps it. StoreDamaged when it isn't as written, StoreError when another version
        wrote it."""
        meta = dict(self.query("SELECT name, value FROM meta"))
        try:
            value = json.loads(meta["spec"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreDamaged(
                f"{self.path} is damaged: its copy of the spec is unreadable; {REPAIR_METADATA}"
            ) from error
        if spec_digest(value) != meta.get("spec_sha256"):
            raise StoreDamaged(
                f"{self.path} is damaged: its copy of the spec is not as written; {REPAIR_METADATA}"
            )
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
                    f"{self.path} is damaged: its copy of {name} is not as written; {REPAIR_METADATA}"
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
                f"{self.path} is damaged (its last row is {last}, but {appended} were appended): {REPLACE_MANIFEST}"
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
            raise StoreDamaged(f"{self.path} is damaged (a shard has no number): {REPLACE_MANIFEST}")
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
                    raise StoreDamaged(
                        f"{self.path} is damaged (its keys are out of order): {REPLACE_MANIFEST}"
                    )
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
                f"{self.path} is damaged (its sets of images: {error}): {REPLACE_MANIFEST}"
            ) from error

    def records(self, status: Status | None = "done", rows: range | None = None) -> list[ImageRecord]:
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
        images: Iterable[ImageRef],
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

    def relist(self, images: Iterable[ImageRef]) -> None:
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
        with self._mutex, database.explain_sqlite_errors(self.path):
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


# --- Between the manifest's tables and records: SQL rows in and out, verified by the digest that they carry.

_SELECT = """
SELECT row, key, size, "offset", reason, sha256, bytes, height, width, resized_height, resized_width, crc32c,
       scales_crc32c, kept_offset, kept_bytes, kept_crc32c, results.row IS NOT NULL, results.digest
"""

SELECT_RECORDS = f"{_SELECT} FROM images LEFT JOIN results USING (row)"

SELECT_LISTED = f"{_SELECT} FROM results CROSS JOIN images USING (row)"
"""Of rows with results alone. SQLite keeps the order of a CROSS JOIN: few failed rows are found by their index."""


def record_of(fields: tuple) -> ImageRecord:
    """The record in a row of one of these; StoreDamaged when it isn't what was committed."""
    *content, listed, digest = fields
    (row, key, size, offset, reason, sha256, length, height, width, resized_height, resized_width,
     crc, scales_crc, *kept) = content  # fmt: skip
    if not isinstance(key, bytes) or (listed and row_digest(tuple(content)) != digest):
        raise StoreDamaged(
            f"the manifest's row {row} is damaged (its checksum is not that of its fields): take its shard out with "
            "mobilesam inspect STORE --repair, and compute it anew"
        )
    return ImageRecord(
        row=row,
        key=os.fsdecode(key),
        status="pending" if not listed else "done" if reason is None else "failed",
        reason=reason,
        sha256=None if sha256 is None else sha256.hex(),
        bytes=length,
        original_size=None if height is None else (height, width),
        resized_size=None if resized_height is None else (resized_height, resized_width),
        crc32c=crc,
        scales_crc32c=scales_crc,
        kept=None if kept[0] is None else KeptImage(offset=kept[0], bytes=kept[1], crc32c=kept[2]),
        offset=offset,
        size=size,
    )


def result_fields(result: RowResult) -> tuple:
    """A result as the table `results` holds it, less the digest."""
    kept = result.kept
    return (
        result.row,
        result.reason,
        None if result.sha256 is None else bytes.fromhex(result.sha256),
        result.bytes,
        *(result.original_size or (None, None)),
        *(result.resized_size or (None, None)),
        result.crc32c,
        result.scales_crc32c,
        *((kept.offset, kept.bytes, kept.crc32c) if kept else (None, None, None)),
    )


# --- Checksums of what the manifest says: SQLite itself takes a flipped bit in a value for the value.


def row_digest(fields: tuple) -> int:
    """crc32c of a listed row: its image (row, key, size, offset) and its result's fields.

    Of the fields' Python literals in ASCII: integers, bytes, text and None have one form each.
    """
    return crc32c(ascii(fields).encode("ascii"))


def shard_digest(fields: tuple, rows: Iterable[int]) -> int:
    """crc32c of a listed shard: its own fields, and its rows' digests in row order."""
    return crc32c(ascii((fields, tuple(rows))).encode("ascii"))


class KeysDigest:
    """SHA-256 of a set of images as appended: how it was chosen, then every key in row order."""

    def __init__(self, fields: tuple) -> None:
        self._hash = hashlib.sha256(ascii(fields).encode("ascii"))

    def add(self, key: bytes) -> None:
        """Take in the next row's key."""
        self._hash.update(b"%d:%b" % (len(key), key))

    def value(self) -> bytes:
        """The digest so far, 32 bytes."""
        return self._hash.digest()
