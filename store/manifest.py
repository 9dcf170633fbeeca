"""The manifest: the one truth about which rows exist, in SQLite inside the store.

A row's image stands in `images` for good. What a worker learned of it stands in `results` exactly as long as
its shard stands in `shards`: committing and withdrawing a shard are one transaction each.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from .errors import StoreDamaged, StoreError
from .records import Counts, ImageRecord, NewImage, RowResult, Selection, Status
from .spec import StoreSpec

BUSY_SECONDS = 60.0
"""How long a statement waits for another process's transaction."""

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE extensions (
    first_row INTEGER PRIMARY KEY, rows INTEGER NOT NULL, fraction REAL NOT NULL, seed INTEGER NOT NULL,
    "limit" INTEGER);
CREATE TABLE images (
    row INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, "offset" INTEGER);
CREATE TABLE shards (
    shard INTEGER PRIMARY KEY, rows INTEGER NOT NULL, done INTEGER NOT NULL, failed INTEGER NOT NULL,
    attempt TEXT NOT NULL);
CREATE TABLE results (
    row INTEGER PRIMARY KEY, reason TEXT, sha256 BLOB, bytes INTEGER, height INTEGER, width INTEGER,
    resized_height INTEGER, resized_width INTEGER, crc32c INTEGER, scales_crc32c INTEGER);
CREATE INDEX failed_results ON results (row) WHERE reason IS NOT NULL;
"""

_RECORDS = """
SELECT row, key, size, "offset", results.row IS NOT NULL, reason, sha256, bytes, height, width, resized_height,
       resized_width, crc32c, scales_crc32c
FROM images LEFT JOIN results USING (row)
"""


class Manifest:
    """One open manifest. Safe to use from several threads; one statement or transaction at a time."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.path = path
        self._mutex = threading.RLock()
        self._connection = _connect(path, writable=writable)

    @classmethod
    def create(cls, path: Path, spec: StoreSpec) -> Manifest:
        """Make an empty manifest that belongs to the store that `spec` describes."""
        with _explained(path), closing(sqlite3.connect(path)) as connection:
            connection.executescript("PRAGMA journal_mode = DELETE;" + _SCHEMA)
            meta = {"store_id": spec.store_id, "spec_sha256": spec.digest()}
            connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
            connection.commit()
        return cls(path, writable=True)

    def close(self) -> None:
        """Close the connection; the object is of no further use."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._mutex, _explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk makes SQLite roll back by itself.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _all(self, statement: str, values: Sequence[object] = ()) -> list[tuple]:
        with self._mutex, _explained(self.path):
            return self._connection.execute(statement, values).fetchall()

    # ---- reading

    def refuse_foreign(self, spec: StoreSpec) -> None:
        """StoreDamaged unless this is the manifest of the very store that `spec`, its zarr.json's, describes."""
        meta = dict(self._all("SELECT name, value FROM meta"))
        if meta.get("store_id") != spec.store_id:
            raise StoreDamaged(
                f"{self.path} belongs to store {meta.get('store_id')}, zarr.json to {spec.store_id}: "
                "put this store's own manifest back"
            )
        if meta.get("spec_sha256") != spec.digest():
            raise StoreDamaged(
                f"the attributes in zarr.json are not those that {self.path} was made with: "
                "put this store's own zarr.json back"
            )

    def row_count(self) -> int:
        """How many rows the store has, whatever their status."""
        last = self._all("SELECT max(row) FROM images")[0][0]
        return 0 if last is None else int(last) + 1

    def counts(self) -> Counts:
        """Rows by status."""
        done, failed = self._all("SELECT coalesce(sum(done), 0), coalesce(sum(failed), 0) FROM shards")[0]
        return Counts(done=done, failed=failed, pending=self.row_count() - done - failed)

    def committed_shards(self) -> dict[int, int]:
        """Every committed shard with the number of rows that it was committed with."""
        return dict(self._all("SELECT shard, rows FROM shards ORDER BY shard"))

    def shards_with_failures(self) -> list[int]:
        """Committed shards in which at least one image failed."""
        return [shard for (shard,) in self._all("SELECT shard FROM shards WHERE failed > 0 ORDER BY shard")]

    def keys(self) -> list[str]:
        """The key of every row, in row order."""
        return [os.fsdecode(key) for (key,) in self._all("SELECT key FROM images ORDER BY row")]

    def selections(self) -> list[Selection]:
        """How the first set of images and each extension were chosen, in order."""
        return [
            Selection(fraction=fraction, seed=seed, limit=limit)
            for fraction, seed, limit in self._all(
                'SELECT fraction, seed, "limit" FROM extensions ORDER BY first_row'
            )
        ]

    def records(self, status: Status | None = None, rows: range | None = None) -> list[ImageRecord]:
        """Records in row order: those of one status, or all; of a range of rows, or all."""
        where, values = ["1"], []
        if status is not None:
            where.append(
                {
                    "pending": "results.row IS NULL",
                    "done": "results.row IS NOT NULL AND reason IS NULL",
                    "failed": "reason IS NOT NULL",
                }[status]
            )
        if rows is not None:
            where.append("row >= ? AND row < ?")
            values += [rows.start, rows.stop]
        found = self._all(f"{_RECORDS} WHERE {' AND '.join(where)} ORDER BY row", values)
        return [_record(fields) for fields in found]

    def checksums(self, rows: range) -> dict[int, tuple[int, int | None]]:
        """crc32c of the payload, and of the scales where there are any, of every done row in the range."""
        found = self._all(
            "SELECT row, crc32c, scales_crc32c FROM results WHERE row >= ? AND row < ? AND reason IS NULL",
            (rows.start, rows.stop),
        )
        return {row: (crc, scales_crc) for row, crc, scales_crc in found}

    # ---- writing

    def append(self, images: Iterable[NewImage], selection: Selection) -> range:
        """Give the images the next rows, in the order given; their range."""
        with self._transaction() as connection:
            first = self.row_count()
            rows = [
                (first + number, os.fsencode(image.key), image.size, image.offset)
                for number, image in enumerate(images)
            ]
            connection.executemany("INSERT INTO images VALUES (?, ?, ?, ?)", rows)
            connection.execute(
                "INSERT INTO extensions VALUES (?, ?, ?, ?, ?)",
                (first, len(rows), selection.fraction, selection.seed, selection.limit),
            )
        return range(first, first + len(rows))

    def relist(self, images: Iterable[NewImage]) -> None:
        """Update size and offset of pending rows by key."""
        with self._transaction() as connection:
            connection.executemany(
                'UPDATE images SET size = ?1, "offset" = ?2 WHERE key = ?3 AND (size, "offset") IS NOT (?1, ?2) '
                "AND row NOT IN (SELECT row FROM results)",
                ((image.size, image.offset, os.fsencode(image.key)) for image in images),
            )

    def commit_shard(self, shard: int, attempt: str, results: Sequence[RowResult]) -> None:
        """List a shard and all its rows; the shard must not be listed already."""
        failed = sum(result.reason is not None for result in results)
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO shards VALUES (?, ?, ?, ?, ?)",
                (shard, len(results), len(results) - failed, failed, attempt),
            )
            connection.executemany(
                "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", map(_result_fields, results)
            )

    def withdraw_shard(self, shard: int, rows: range) -> None:
        """Unlist a shard: its rows are pending again."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM shards WHERE shard = ?", (shard,))
            connection.execute("DELETE FROM results WHERE row >= ? AND row < ?", (rows.start, rows.stop))


def _connect(path: Path, *, writable: bool) -> sqlite3.Connection:
    """Open without creating. A reader leaves the file system alone unless a killed writer's transaction has to
    be rolled back first, which takes write access once."""
    if not path.is_file():
        raise StoreDamaged(f"{path} is missing: without its manifest a store can't be read; make it anew")
    with _explained(path):
        try:
            return _open(path, "rw" if writable else "ro", writable)
        except sqlite3.OperationalError as error:
            if writable or not _needs_rollback(error):
                raise
            _open(path, "rw", writable=True).close()  # opening rolls it back
            return _open(path, "ro", writable)


def _open(path: Path, mode: str, writable: bool) -> sqlite3.Connection:
    # A URI, so that the mode can be given; the path's own '?' and '#' are escaped by as_uri.
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        if writable:
            connection.execute("PRAGMA synchronous = FULL")
        connection.execute("SELECT count(*) FROM meta").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _needs_rollback(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_READONLY


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """SQLite's errors as the store's, with the mend."""
    try:
        yield
    except sqlite3.OperationalError as error:
        code = error.sqlite_errorcode & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise StoreError(f"no room left on the disk of {path}: free some and run again") from error
        if code == sqlite3.SQLITE_READONLY:
            raise StoreError(
                f"{path} can't be written, and needs to be: a writer was killed in a transaction, or this is "
                "one; check permissions and run again"
            ) from error
        if code == sqlite3.SQLITE_CANTOPEN:
            raise StoreError(f"{path} can't be opened: check its permissions") from error
        if code == sqlite3.SQLITE_BUSY:
            raise StoreError(
                f"{path} stayed locked for {BUSY_SECONDS:.0f} s: another process holds it"
            ) from error
        if code == sqlite3.SQLITE_ERROR:
            raise StoreDamaged(f"{path} is damaged ({error}): make the store anew") from error
        raise StoreError(f"{path}: {error}; check the disk and run again") from error
    except sqlite3.IntegrityError as error:
        raise StoreError(f"{path} refuses what it was given ({error}): nothing was changed") from error
    except sqlite3.DatabaseError as error:
        raise StoreDamaged(f"{path} is damaged ({error}): make the store anew") from error


def _record(fields: tuple) -> ImageRecord:
    (row, key, size, offset, listed, reason, sha256, length, height, width, resized_height, resized_width,
     crc, scales_crc) = fields  # fmt: skip
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
        offset=offset,
        size=size,
    )


def _result_fields(result: RowResult) -> tuple:
    return (
        result.row,
        result.reason,
        None if result.sha256 is None else bytes.fromhex(result.sha256),
        result.bytes,
        *(result.original_size or (None, None)),
        *(result.resized_size or (None, None)),
        result.crc32c,
        result.scales_crc32c,
    )
