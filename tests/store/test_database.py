"""The manifest's SQLite file: opening it, whole, damaged or left by a killed writer."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable

import pytest
from small_store import EVERYTHING, compute, embeddings
from store_damage import found_problems, run_sql

from mobilesam.store import (
    EmbeddingStore,
    ImageRef,
    StoreDamaged,
    StoreError,
)
from mobilesam.store.inspection import inspect_store
from mobilesam.store.layout import MANIFEST

NewStore = Callable[..., EmbeddingStore]


def test_a_full_disk_under_the_manifest_is_reported_as_such_and_changes_nothing(new_store: NewStore) -> None:
    store = new_store()
    connection = store.manifest._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    many = [ImageRef(key=f"{number:0200d}.jpg", size=1) for number in range(500)]
    with pytest.raises(StoreError, match="no room left on the disk") as caught:
        store.extend(many, EVERYTHING)
    assert not isinstance(caught.value, StoreDamaged)
    assert store.manifest.row_count() == 8
    compute(store, embeddings())
    assert store.manifest.counts().done == 8


def test_a_transaction_that_a_killed_writer_left_is_rolled_back(full_store: EmbeddingStore) -> None:
    full_store.close()
    script = (
        "import sqlite3, sys, os\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('PRAGMA cache_size = 1'); c.execute('BEGIN IMMEDIATE')\n"
        "c.execute('DELETE FROM shards')\n"
        "c.executemany('INSERT INTO images VALUES (?, ?, 1, NULL)', ((r, b'k%d' % r) for r in range(9, 5000)))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    manifest = full_store.path / MANIFEST
    subprocess.run([sys.executable, "-c", script, str(manifest)], check=False)
    assert manifest.with_name("manifest.sqlite-journal").exists()
    with EmbeddingStore.open(full_store.path) as store:
        assert store.manifest.row_count() == 8
        assert store.manifest.counts().done == 8
    assert sqlite3.connect(manifest).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_writer_removes_the_journal_of_a_transaction_that_was_killed_before_it_changed_anything(
    full_store: EmbeddingStore,
) -> None:
    full_store.close()
    journal = full_store.path / f"{MANIFEST}-journal"
    journal.write_bytes(bytes(512))
    with EmbeddingStore.open(full_store.path, writable=True) as store:
        assert store.manifest.counts().done == 8
        assert not journal.exists()


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to be one" * 99])
def test_a_damaged_manifest_is_an_error(full_store: EmbeddingStore, content: bytes) -> None:
    full_store.close()
    (full_store.path / MANIFEST).write_bytes(content)
    with pytest.raises(StoreDamaged, match=r"manifest\.sqlite"):
        EmbeddingStore.open(full_store.path)


def test_a_missing_manifest_is_an_error(full_store: EmbeddingStore) -> None:
    full_store.close()
    (full_store.path / MANIFEST).unlink()
    with pytest.raises(StoreDamaged, match="manifest"):
        EmbeddingStore.open(full_store.path)


def test_a_manifest_of_an_earlier_version_says_so(store: EmbeddingStore) -> None:
    run_sql(store, "PRAGMA user_version = 0")
    with pytest.raises(StoreError, match=r"made by an earlier version .* precompute a new store") as caught:
        EmbeddingStore.open(store.path)
    assert not isinstance(caught.value, StoreDamaged)
    run_sql(store, "PRAGMA user_version = 9")
    with pytest.raises(StoreError, match="made by a later version"):
        inspect_store(store.path)


def test_a_flipped_bit_in_the_manifests_schema_is_damage(store: EmbeddingStore) -> None:
    manifest = store.path / MANIFEST
    data = manifest.read_bytes()
    place = data.index(b"INTEGER PRIMARY KEY, reason TEXT")
    manifest.write_bytes(data[:place] + b"iNTEGER" + data[place + 7 :])
    with pytest.raises(StoreDamaged, match="its tables are not as they were made"):
        EmbeddingStore.open(store.path)


def test_text_that_is_no_utf8_in_the_manifest_is_damage(store: EmbeddingStore) -> None:
    run_sql(store, "UPDATE results SET reason = CAST(x'ff' AS TEXT) WHERE row = 4")
    with EmbeddingStore.open(store.path) as reader, pytest.raises(StoreDamaged, match="damaged"):
        reader.manifest.records("failed")
    assert found_problems(store) == [("listing", 1, None)]
