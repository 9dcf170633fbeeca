"""Damage to a whole store, found and named: swapped files, leftovers, the manifest, documents, audits."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from small_store import compute, embeddings
from store_damage import flip_byte, found_problems, run_sql, shard_file

from mobilesam.store import (
    Audit,
    EmbeddingStore,
    ShardWriter,
    StoreDamaged,
    tolerance,
)
from mobilesam.store.inspection import inspect_store, inspection_lines
from mobilesam.store.layout import HEAD as HEAD_FILE
from mobilesam.store.layout import MANIFEST

NewStore = Callable[..., EmbeddingStore]


def test_swapped_shards_name_whose_bytes_they_hold(new_store: NewStore) -> None:
    store = new_store()
    compute(store, embeddings())
    store.close()
    first, second, aside = shard_file(store, 0), shard_file(store, 1), store.path / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    problems = inspect_store(store.path, check=True)["problems"]
    assert [(p["kind"], p["row"]) for p in problems] == [("identity", row) for row in range(6)]
    assert [p["message"].rpartition(" row ")[2] for p in problems] == ["3", "4", "5", "0", "1", "2"]


def test_a_shard_of_another_store_is_foreign(new_store: NewStore) -> None:
    store, other = new_store("a.zarr"), new_store("b.zarr")
    compute(store, embeddings(seed=0))
    compute(other, embeddings(seed=1))
    shutil.copy(shard_file(other, 2), shard_file(store, 2))
    problems = inspect_store(store.path, check=True)["problems"]
    assert [(p["kind"], p["row"]) for p in problems] == [("identity", 6), ("identity", 7)]
    assert not any("they are those" in p["message"] for p in problems)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE images SET key = x'61' WHERE row = 2",
        "UPDATE images SET key = 'text' WHERE row = 2",
        "UPDATE extensions SET seed = 5",
        "UPDATE extensions SET sources = '[\"/other\"]'",
    ],
)
def test_a_changed_key_or_selection_cannot_be_repaired(store: EmbeddingStore, statement: str) -> None:
    run_sql(store, statement)
    for repair in (False, True):
        (problem,) = inspect_store(store.path, check=True, repair=repair)["problems"]
        assert (problem["kind"], problem["shard"]) == ("listing", None)
        assert "make the store again" in problem["message"]


def test_sources_that_are_no_json_are_damage(store: EmbeddingStore) -> None:
    run_sql(store, "UPDATE extensions SET sources = '[]x'")
    with pytest.raises(StoreDamaged, match=r"manifest\.sqlite is damaged"):
        inspect_store(store.path)


@pytest.mark.parametrize("bit", [7, 8], ids=["129 rows or so", "257 rows or so"])
@pytest.mark.parametrize(
    "table", ["meta", "documents", "extensions", "images", "shards", "results", "failed_results", "audits"]
)
def test_rows_that_a_flipped_bit_makes_up_in_the_manifest_are_damage(
    store: EmbeddingStore, table: str, bit: int
) -> None:
    # A page's number of rows stands in bytes 3 and 4; those that aren't there read as NULL in every column.
    manifest = store.path / MANIFEST
    with closing(sqlite3.connect(manifest)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
    data = bytearray(manifest.read_bytes())
    data[(page - 1) * 4096 + 4 - bit // 8] ^= 1 << bit % 8
    manifest.write_bytes(data)
    for repair in (False, True):
        try:
            problems = inspect_store(store.path, check=True, repair=repair)["problems"]
        except StoreDamaged:
            continue
        assert "listing" in {problem["kind"] for problem in problems}


def test_a_row_that_vanished_is_damage_at_once(store: EmbeddingStore) -> None:
    run_sql(store, "DELETE FROM images WHERE row = 7")
    with pytest.raises(StoreDamaged, match="its last row is 6, but 8 were appended"):
        inspect_store(store.path)


def test_a_row_number_far_out_does_not_make_work_for_ever(store: EmbeddingStore) -> None:
    run_sql(store, "UPDATE images SET row = 1125899906842624 WHERE row = 7")
    with EmbeddingStore.open(store.path) as reader, pytest.raises(StoreDamaged, match="damaged"):
        reader.pending_shards()


def test_what_a_killed_writer_left_is_reported_by_name(store: EmbeddingStore) -> None:
    carried = "embeddings/mobilesam/carried/1.json.00c0ffee.partial"
    left = ["embeddings/c.1.0.0.0.dead.partial", "scales/c.7.0", "zarr.json.00c0ffee.partial", carried]
    (store.path / carried).parent.mkdir()
    for name in left:
        (store.path / name).write_bytes(b"x")
    problems = inspect_store(store.path, check=True)["problems"]
    assert {p["kind"] for p in problems} == {"orphan"}
    assert sorted(p["file"] for p in problems) == sorted(str(store.path / name) for name in left)


def test_files_of_other_people_are_no_problem(store: EmbeddingStore) -> None:
    for name in ["notes.txt", "embeddings/c.1.0.0.0.txt", "embeddings/c.01.0.0.0", "embeddings/c.9.0"]:
        (store.path / name).write_bytes(b"x")
    assert found_problems(store) == []


def test_a_live_writer_is_named_and_its_attempts_are_no_orphans(new_store: NewStore) -> None:
    store = new_store()
    compute(store, embeddings(), shards=[0])
    with ShardWriter(store.path, store.spec.layouts, 1, "live", 3):
        result = inspect_store(store.path, check=True)
    assert result["writer"]["pid"] == os.getpid()
    assert result["problems"] == []
    assert f"process {os.getpid()} on " in "\n".join(inspection_lines(result))


@pytest.mark.parametrize("name", ["zarr.json", "embeddings/zarr.json", "scales/zarr.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"attributes": {"mobilesam": {"format": 9}}}'])
def test_a_changed_document_is_reported_even_without_a_check(
    store: EmbeddingStore, name: str, content: bytes | None
) -> None:
    (store.path / name).unlink() if content is None else (store.path / name).write_bytes(content)
    (problem,) = inspect_store(store.path)["problems"]
    assert (problem["kind"], problem["file"]) == ("metadata", str(store.path / name))


def test_a_changed_head_is_reported_even_without_a_check(store: EmbeddingStore) -> None:
    flip_byte(store.path / HEAD_FILE, 20)
    result = inspect_store(store.path)
    assert [p["kind"] for p in result["problems"]] == ["head"]
    assert result["command"].startswith("mobilesam precompute --images /photos --out ")


def test_audits_are_summed_up_and_those_out_of_tolerance_are_problems(full_store: EmbeddingStore) -> None:
    limits = tolerance("float16", "float32")
    full_store.record_audits(
        [Audit(row=0, cosine=1.0, relative_mse=0.0), Audit(row=5, cosine=0.5, relative_mse=0.7)]
    )
    result = inspect_store(full_store.path)
    assert result["audit"] == {
        "rows": 2,
        "cosine_min": 0.5,
        "relative_mse_max": 0.7,
        "tolerance": {"cosine": limits.cosine, "relative_mse": limits.relative_mse},
    }
    (problem,) = result["problems"]
    assert (problem["kind"], problem["row"], problem["key"]) == ("audit", 5, "photo0005.jpg")
    full_store.record_audits([Audit(row=5, cosine=float("nan"), relative_mse=0.0)])
    result = inspect_store(full_store.path)
    assert result["audit"]["cosine_min"] is None
    assert [p["kind"] for p in result["problems"]] == ["audit"]
    json.dumps(result, allow_nan=False)


def test_a_commit_during_the_check_is_not_taken_for_damage(
    full_store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilesam.store import check

    real = check.shard_listing
    commits = []

    def then_committed_again(manifest: Any, shard: int, size: int) -> Any:
        listing = real(manifest, shard, size)
        if shard == 1 and not commits:
            commits.append(shard)
            full_store.withdraw([1])
            compute(full_store, embeddings(seed=9))
        return listing

    monkeypatch.setattr(check, "shard_listing", then_committed_again)
    assert found_problems(full_store) == []
    assert commits == [1]


def test_progress_counts_rows_up_to_all_of_them(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobilesam.store.check.GROUP_SHARDS", 2)
    heard: list[tuple[int, int]] = []
    inspect_store(store.path, check=True, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(6, 8), (8, 8)]
