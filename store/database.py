"""The manifest's SQLite file: schema, opening, rows as records, SQLite's errors explained."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

from ..common.durable import final_name
from ..common.errors import REPLACE_MANIFEST, StoreDamaged, StoreError
from .checksum import row_digest
from .records import ImageRecord, KeptImage, RowResult

BUSY_SECONDS = 300.0
"""Longest wait for another process's transaction; `inspect --check` reads the whole manifest in one."""

SCHEMA_VERSION = 2
"""Kept as SQLite's user_version; raised whenever a table changes."""

_SCHEMA = f"""
PRAGMA journal_mode = DELETE;
BEGIN;
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (name TEXT PRIMARY KEY, content BLOB NOT NULL, sha256 BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE extensions (
    first_row INTEGER PRIMARY KEY, rows INTEGER NOT NULL, fraction REAL NOT NULL, seed INTEGER NOT NULL,
    "limit" INTEGER, sources TEXT NOT NULL, checkpoint TEXT, digest BLOB NOT NULL);
CREATE TABLE images (
    row INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, "offset" INTEGER);
CREATE TABLE shards (
    shard INTEGER PRIMARY KEY, rows INTEGER NOT NULL, done INTEGER NOT NULL, failed INTEGER NOT NULL,
    attempt TEXT NOT NULL, digest INTEGER NOT NULL);
CREATE TABLE results (
    row INTEGER PRIMARY KEY, reason TEXT, sha256 BLOB, bytes INTEGER, height INTEGER, width INTEGER,
    resized_height INTEGER, resized_width INTEGER, crc32c INTEGER, scales_crc32c INTEGER,
    kept_offset INTEGER, kept_bytes INTEGER, kept_crc32c INTEGER, digest INTEGER NOT NULL);
CREATE INDEX failed_results ON results (row) WHERE reason IS NOT NULL;
CREATE TABLE audits (row INTEGER PRIMARY KEY, cosine REAL, relative_mse REAL);
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""

_SELECT = """
SELECT row, key, size, "offset", reason, sha256, bytes, height, width, resized_height, resized_width, crc32c,
       scales_crc32c, kept_offset, kept_bytes, kept_crc32c, results.row IS NOT NULL, results.digest
"""

SELECT_RECORDS = f"{_SELECT} FROM images LEFT JOIN results USING (row)"
"""SELECT of every row, in the columns that `decode_record` takes."""

SELECT_COMMITTED = f"{_SELECT} FROM results CROSS JOIN images USING (row)"
"""SELECT of the rows of committed shards, in the same columns. SQLite keeps the order of a CROSS JOIN, so that a few
failed rows are found by their index."""


# ---- opening


def create(path: Path) -> None:
    """Create an empty manifest file at the path."""
    with explain_sqlite_errors(path), closing(sqlite3.connect(path)) as connection:
        connection.executescript(_SCHEMA)


def connect(path: Path, *, writable: bool) -> sqlite3.Connection:
    """Open a manifest that exists.

    A reader changes nothing on disk, with one exception: a transaction of a killed writer has to be rolled back
    before anything can be read, which takes write access once.

    Args:
        path: SQLite file.
        writable: open for writing; the caller holds the store's lock.

    Raises:
        StoreDamaged: the file is missing, or its tables are not a manifest's.
        StoreError: another version made the schema, or the file can't be opened.
    """
    if not path.is_file():
        raise StoreDamaged(
            f"{path} is missing: without its manifest a store can't be read; {REPLACE_MANIFEST}"
        )
    with explain_sqlite_errors(path):
        try:
            return _open(path, "rw" if writable else "ro", writable)
        except sqlite3.OperationalError as error:
            if writable or _code(error) != sqlite3.SQLITE_READONLY:
                raise
            _open(path, "rw", writable=True).close()  # opening rolls it back
            return _open(path, "ro", writable)


def _open(path: Path, mode: str, writable: bool) -> sqlite3.Connection:
    # Only a URI can name the mode; as_uri escapes '?' and '#' in the path.
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
        _refuse_other_schemas(path, connection)
        if writable and path.with_name(f"{path.name}-journal").exists():
            _remove_journal(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _remove_journal(connection: sqlite3.Connection) -> None:
    """Remove the journal of a transaction that was killed before it changed anything. SQLite keeps such a journal
    until the next transaction; it rolls back and removes all others by itself."""
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")


def _refuse_other_schemas(path: Path, connection: sqlite3.Connection) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    schema = _schema(connection)
    if not {"meta", "images", "shards", "results"} <= schema.keys():
        raise StoreDamaged(f"{path} is damaged (it has none of a manifest's tables): {REPLACE_MANIFEST}")
    if version != SCHEMA_VERSION:
        other = "an earlier" if version < SCHEMA_VERSION else "a later"
        raise StoreError(
            f"{path} was made by {other} version of mobilesam (its schema is {version}, this program's "
            f"{SCHEMA_VERSION}): read it with that version, or precompute a new store elsewhere"
        )
    if schema != _expected_schema():
        raise StoreDamaged(f"{path} is damaged (its tables are not as they were made): {REPLACE_MANIFEST}")


def _schema(connection: sqlite3.Connection) -> dict[str, str]:
    return dict(connection.execute("SELECT name, sql FROM sqlite_schema"))


@cache
def _expected_schema() -> dict[str, str]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(_SCHEMA)
        return _schema(connection)


# ---- rows as records


def decode_record(fields: tuple) -> ImageRecord:
    """Return the record of one row that `SELECT_RECORDS` or `SELECT_COMMITTED` gave.

    Raises:
        StoreDamaged: the row's checksum is not that of its fields.
    """
    *content, committed, digest = fields
    (row, key, size, offset, reason, sha256, length, height, width, resized_height, resized_width,
     crc, scales_crc, *kept) = content  # fmt: skip
    if not isinstance(key, bytes) or (committed and row_digest(tuple(content)) != digest):
        raise StoreDamaged(
            f"the manifest's row {row} is damaged (its checksum is not that of its fields): remove its shard with "
            "mobilesam inspect STORE --repair, and compute it again"
        )
    return ImageRecord(
        row=row,
        key=os.fsdecode(key),
        status="pending" if not committed else "done" if reason is None else "failed",
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


def encode_result(result: RowResult) -> tuple:
    """Return the result as the columns of the table `results`, without the last, the digest."""
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


# ---- errors


@contextmanager
def explain_sqlite_errors(path: Path) -> Iterator[None]:
    """Raise SQLite's errors inside the context as store errors that say what to do.

    Args:
        path: SQLite file, named in the messages.

    Raises:
        StoreDamaged: the file's content is not what SQLite or the schema expects.
        StoreError: any other error: disk full, no permission, a lock, a failing disk, a value refused by the schema.
    """
    path = Path(final_name(path))  # a store that is being made has a hidden name
    try:
        yield
    except sqlite3.OperationalError as error:
        code = _code(error)
        if code == sqlite3.SQLITE_FULL:
            raise StoreError(f"no room left on the disk of {path}: free some and run again") from error
        if code == sqlite3.SQLITE_READONLY:
            raise StoreError(
                f"{path} can't be written, but has to be, even by a reader after a writer was killed in a "
                "transaction: check its permissions and run again"
            ) from error
        if code == sqlite3.SQLITE_CANTOPEN:
            raise StoreError(f"{path} can't be opened: check its permissions") from error
        if code == sqlite3.SQLITE_BUSY:
            raise StoreError(
                f"{path} stayed locked for {BUSY_SECONDS:.0f} s: another process holds it; "
                "run again once that has ended"
            ) from error
        if code in (sqlite3.SQLITE_ERROR, None):
            raise StoreDamaged(f"{path} is damaged ({error}): {REPLACE_MANIFEST}") from error
        raise StoreError(f"{path}: {error}; check the disk and run again") from error
    except sqlite3.IntegrityError as error:
        raise StoreError(f"{path} refuses the new rows ({error}): nothing was changed") from error
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise StoreDamaged(f"{path} is damaged ({error}): {REPLACE_MANIFEST}") from error


def _code(error: sqlite3.Error) -> int | None:
    """Return SQLite's primary result code; None for an error raised by Python itself (text not in UTF-8)."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
