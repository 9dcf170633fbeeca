"""The manifest's SQLite file: its schema, opening it, and its errors in words."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

from ..common.errors import REPLACE_MANIFEST, StoreDamaged, StoreError

BUSY_SECONDS = 300.0
"""How long a statement waits for another process's transaction; `inspect --check` reads the whole manifest in one."""

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


def create(path: Path) -> None:
    """Make an empty manifest."""
    with explain_sqlite_errors(path), closing(sqlite3.connect(path)) as connection:
        connection.executescript(_SCHEMA)


def connect(path: Path, *, writable: bool) -> sqlite3.Connection:
    """Open without creating. A reader leaves the file system alone unless a killed writer's transaction has to
    be rolled back first, which takes write access once."""
    if not path.is_file():
        raise StoreDamaged(
            f"{path} is missing: without its manifest a store can't be read; {REPLACE_MANIFEST}"
        )
    with explain_sqlite_errors(path):
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
        _refuse_other_schemas(path, connection)
        if writable and path.with_name(f"{path.name}-journal").exists():
            _remove_journal(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _remove_journal(connection: sqlite3.Connection) -> None:
    """Of a transaction that was killed before it changed anything: SQLite rolls back and removes others by itself,
    and lets this one lie until the next transaction."""
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
            f"{SCHEMA_VERSION}): read it with that version, or precompute anew into another place"
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


def _needs_rollback(error: sqlite3.OperationalError) -> bool:
    return _code(error) == sqlite3.SQLITE_READONLY


def _code(error: sqlite3.Error) -> int | None:
    """SQLite's primary result code; None for an error of Python's module, as for text that is not UTF-8."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


@contextmanager
def explain_sqlite_errors(path: Path) -> Iterator[None]:
    """SQLite's errors as the store's, with the mend."""
    try:
        yield
    except sqlite3.OperationalError as error:
        code = _code(error)
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
        if code in (sqlite3.SQLITE_ERROR, None):
            raise StoreDamaged(f"{path} is damaged ({error}): {REPLACE_MANIFEST}") from error
        raise StoreError(f"{path}: {error}; check the disk and run again") from error
    except sqlite3.IntegrityError as error:
        raise StoreError(f"{path} refuses what it was given ({error}): nothing was changed") from error
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise StoreDamaged(f"{path} is damaged ({error}): {REPLACE_MANIFEST}") from error
