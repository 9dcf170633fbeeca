"""Rows of a store by columns: the digest, records on demand."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from mobilesam.common.errors import StoreDamaged
from mobilesam.distill.checksummed_json import digest
from mobilesam.distill.data import rows as rows_module
from mobilesam.distill.data.rows import CommittedRows, RecordsByRow
from mobilesam.store import EmbeddingStore, manifest


@pytest.mark.parametrize("page", [1, 2, 100])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_digest_is_that_of_the_list_of_all_rows_checksums(
    save_images: Callable[..., Path],
    make_store: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    page: int,
) -> None:
    monkeypatch.setattr(manifest, "PAGE_KEYS", page)
    images = save_images([(20, 30), (30, 20), (16, 16)])
    with EmbeddingStore.open(make_store(images, dtype=dtype)) as store:
        records = store.manifest.records("done")
        found = CommittedRows.of(store)
    assert found.rows_N.tolist() == [record.row for record in records]
    assert [sha.ljust(32, b"\0").hex() for sha in found.sha256_N] == [record.sha256 for record in records]
    fields = [(record.row, record.crc32c, record.scales_crc32c, record.sha256) for record in records]
    assert (fields[0][2] is None) == (dtype != "int8")
    assert found.digest == digest(fields)


def test_records_are_read_when_they_are_asked_for_and_the_last_ones_kept(
    save_images: Callable[..., Path], make_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "KEPT_RECORDS", 2)
    images = save_images([(20, 30), (30, 20), (16, 16)])
    with EmbeddingStore.open(make_store(images)) as store:
        records = RecordsByRow(store)
        assert dict(records) == {record.row: record for record in store.manifest.records("done")}
        assert len(records) == 3
        with pytest.raises(KeyError):
            records[3]
        asked: list[range] = []
        read = store.manifest.records
        monkeypatch.setattr(
            store.manifest, "records", lambda status, rows: asked.append(rows) or read(status, rows)
        )
        for row in (0, 0, 1, 0, 2, 1):
            records[row]
        assert [rows.start for rows in asked] == [0, 1, 2, 1]


@pytest.mark.parametrize("change", ["sha256 = NULL", "sha256 = x'00'", "crc32c = 'x'", "scales_crc32c = 'x'"])
def test_a_row_without_a_checksum_is_named(
    save_images: Callable[..., Path], make_store: Callable[..., Path], change: str
) -> None:
    place = make_store(save_images([(20, 30), (30, 20), (16, 16)]))
    with EmbeddingStore.open(place) as store:
        path = store.manifest.path
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE results SET {change} WHERE row = 1")
    with EmbeddingStore.open(place) as store, pytest.raises(StoreDamaged, match="row 1 is damaged"):
        CommittedRows.of(store)
