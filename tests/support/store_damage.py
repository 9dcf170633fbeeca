"""Damage done to a small store on purpose, and the problems that a check finds in it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from mobilesam.store import EmbeddingStore
from mobilesam.store.inspection import inspect_store
from mobilesam.store.layout import MANIFEST


def shard_file(store: EmbeddingStore, shard: int, array: int = 0) -> Path:
    """Return the path of a shard's file of one array: 0 embeddings, 1 scales."""
    layout = store.spec.layouts[array]
    return store.path / layout.name / layout.file_name(shard)


def flip_byte(path: Path, byte: int) -> None:
    """Invert the lowest bit of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def run_sql(store: EmbeddingStore, statement: str) -> None:
    """Change the manifest."""
    with closing(sqlite3.connect(store.path / MANIFEST)) as connection, connection:
        connection.execute(statement)


def found_problems(store: EmbeddingStore) -> list[tuple[str, int | None, int | None]]:
    """Check the store and return (kind, shard, row) of every problem."""
    return [(p["kind"], p["shard"], p["row"]) for p in inspect_store(store.path, check=True)["problems"]]
