"""Commit, withdraw, extend: what is listed, and what lies on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_store import EVERYTHING, compute, embeddings, images

from mobilesam.store import (
    Counts,
    EmbeddingStore,
    ImageRef,
    RowResult,
    Selection,
    ShardWriter,
    StoreDamaged,
    StoreError,
)

NewStore = Callable[..., EmbeddingStore]


def _files(store: EmbeddingStore) -> dict[str, tuple[int, bytes]]:
    folder = store.path / "embeddings"
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in sorted(folder.glob("c.*"))}


def test_a_new_store_has_only_pending_rows(new_store: NewStore) -> None:
    store = new_store()
    assert store.manifest.counts() == Counts(done=0, failed=0, pending=8)
    assert store.pending_shards() == [0, 1, 2]
    with pytest.raises(StoreError, match="no committed rows"):
        store.read([0])


def test_float32_comes_back_as_it_went_in(new_store: NewStore) -> None:
    store = new_store(dtype="float32")
    compute(store, embeddings())
    np.testing.assert_array_equal(store.read([7, 0, 3, 3]).values, embeddings()[[7, 0, 3, 3]])


def test_float16_is_the_nearest_float16(full_store: EmbeddingStore) -> None:
    np.testing.assert_array_equal(full_store.read(range(8)).values, embeddings().astype(np.float16))


def test_records_tell_what_the_worker_learned(full_store: EmbeddingStore) -> None:
    record = full_store.manifest.records()[5]
    assert (record.row, record.key, record.status) == (5, "photo0005.jpg", "done")
    assert (record.bytes, record.original_size, record.resized_size) == (105, (30, 40), (48, 64))
    assert record.sha256 == f"{5:064x}"


def test_a_failed_row_is_listed_with_its_reason_and_never_read(new_store: NewStore) -> None:
    store = new_store()
    compute(store, embeddings(), failed=[4])
    assert store.manifest.counts() == Counts(done=7, failed=1, pending=0)
    assert [(record.row, record.reason) for record in store.manifest.records("failed")] == [(4, "truncated")]
    assert store.manifest.shards_with_failures() == [1]
    with pytest.raises(StoreError, match=r"row 4 .* is not done"):
        store.read([3, 4])


def test_a_shard_is_not_listed_before_it_is_committed(new_store: NewStore) -> None:
    store = new_store()
    rows = store.shard_rows(0)
    with ShardWriter(store.path, store.spec.layouts, 0, "attempt", len(rows)) as writer:
        for row in rows:
            writer.add(row, embeddings()[row])
        writer.finish()
    assert store.pending_shards() == [0, 1, 2]
    assert (store.path / "embeddings" / "c.0.0.0.0.attempt.partial").exists()


def test_leaving_a_writer_early_leaves_nothing(new_store: NewStore) -> None:
    store = new_store(dtype="int8")

    def fail_half_way() -> None:
        with ShardWriter(store.path, store.spec.layouts, 0, "attempt", 3) as writer:
            writer.add(0, embeddings()[0])
            raise RuntimeError("teacher died")

    with pytest.raises(RuntimeError, match="teacher died"):
        fail_half_way()
    assert not list(store.path.rglob("*.partial"))


def test_an_unfinished_attempt_is_refused_and_the_shard_stays_pending(new_store: NewStore) -> None:
    store = new_store()
    partial = store.path / "embeddings" / "c.0.0.0.0.attempt.partial"
    partial.write_bytes(b"short")
    results = [RowResult(row=row, reason="none") for row in store.shard_rows(0)]
    with pytest.raises(StoreError, match="has 5 bytes instead of"):
        store.commit(0, "attempt", results)
    assert 0 in store.pending_shards()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_values_that_float16_cannot_hold_are_refused(new_store: NewStore, bad: float) -> None:
    store = new_store()
    emb_CHW = embeddings()[0]
    emb_CHW[3, 2, 1] = bad
    with (
        ShardWriter(store.path, store.spec.layouts, 0, "attempt", 3) as writer,
        pytest.raises(ValueError, match=r"NaN or infinite|past float16's range"),
    ):
        writer.add(0, emb_CHW)


def test_extending_fills_the_short_last_shard_and_leaves_the_others_alone(full_store: EmbeddingStore) -> None:
    before = _files(full_store)
    rows = full_store.extend(images(11)[8:], EVERYTHING)
    assert rows == range(8, 11)
    assert full_store.pending_shards() == [2, 3]
    assert full_store.manifest.counts() == Counts(done=6, failed=0, pending=5)
    compute(full_store, embeddings(11))
    after = _files(full_store)
    for name in ("c.0.0.0.0", "c.1.0.0.0"):
        assert after[name] == before[name]
    np.testing.assert_array_equal(full_store.read(range(11)).values, embeddings(11).astype(np.float16))


def test_extending_after_a_full_last_shard_withdraws_nothing(new_store: NewStore) -> None:
    store = new_store(rows=6)
    compute(store, embeddings())
    store.extend(images(7)[6:], EVERYTHING)
    assert store.pending_shards() == [2]


def test_a_withdrawn_shard_is_pending_and_can_be_committed_again(full_store: EmbeddingStore) -> None:
    first = _files(full_store)
    full_store.withdraw([1])
    assert full_store.manifest.counts() == Counts(done=5, failed=0, pending=3)
    with pytest.raises(StoreError, match="no committed rows"):
        full_store.read([3])
    compute(full_store, embeddings())
    again = _files(full_store)
    assert {name: data for name, (_, data) in first.items()} == {
        name: data for name, (_, data) in again.items()
    }


def test_a_reader_that_was_open_sees_shards_committed_later(new_store: NewStore) -> None:
    writer = new_store()
    with EmbeddingStore.open(writer.path) as reader:
        assert reader.manifest.counts().done == 0
        compute(writer, embeddings())
        np.testing.assert_array_equal(reader.read([2]).values[0], embeddings()[2].astype(np.float16))


def test_a_reader_that_was_open_reads_on_when_its_shard_was_extended(full_store: EmbeddingStore) -> None:
    with EmbeddingStore.open(full_store.path) as reader:
        reader.read([6])
        full_store.extend(images(9)[8:], EVERYTHING)
        with pytest.raises(StoreError, match=r"not done|no committed rows"):
            reader.read([8])
        compute(full_store, embeddings(9))
        np.testing.assert_array_equal(reader.read([8]).values[0], embeddings(9)[8].astype(np.float16))


def test_a_full_disk_under_the_manifest_is_told_as_such_and_changes_nothing(new_store: NewStore) -> None:
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


def test_a_key_twice_is_refused_without_calling_the_store_damaged(full_store: EmbeddingStore) -> None:
    with pytest.raises(StoreError, match="nothing was changed") as caught:
        full_store.manifest.append(images(1), EVERYTHING, lambda rows: {})
    assert not isinstance(caught.value, StoreDamaged)


def test_keys_come_back_whatever_their_bytes(tmp_path: Path) -> None:
    from small_store import HEAD, make_spec

    names = [os.fsdecode(b"caf\xe9.jpg"), "new\nline.jpg", "-dash.jpg", "日本.png", "a" * 255, "'; DROP.jpg"]
    new = [ImageRef(key=name, size=1) for name in names]
    with EmbeddingStore.create(tmp_path / "s.zarr", make_spec(), new, EVERYTHING, HEAD) as store:
        assert [record.key for record in store.manifest.records(None)] == names


def test_every_selection_is_remembered(full_store: EmbeddingStore) -> None:
    more = Selection(fraction=0.5, seed=3, limit=9)
    full_store.extend(images(9)[8:], more)
    assert full_store.manifest.selections() == [EVERYTHING, more]


def test_sources_survive_whatever_their_bytes(full_store: EmbeddingStore) -> None:
    paths = (os.fsdecode(b"/caf\xe9"), "/new\nline", "/日本 'x'")
    more = Selection(fraction=1.0, seed=0, limit=None, sources=paths, checkpoint=paths[0])
    full_store.extend(images(9)[8:], more)
    with EmbeddingStore.open(full_store.path) as reader:
        assert reader.manifest.selections()[-1] == more


def test_sorted_keys_are_all_of_them_ascending_by_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from small_store import HEAD, make_spec

    monkeypatch.setattr("mobilesam.store.manifest.PAGE_KEYS", 3)
    names = [b"b", b"a\xff", b"\xe9", b"B", b"a", b"aa", b"\xc3\xa9"]
    new = [ImageRef(key=os.fsdecode(name), size=1) for name in names]
    with EmbeddingStore.create(tmp_path / "s.zarr", make_spec(), new, EVERYTHING, HEAD) as store:
        assert list(store.manifest.sorted_keys()) == sorted(names)


def test_keys_out_of_order_are_damage_rather_than_a_search_for_ever(full_store: EmbeddingStore) -> None:
    keys = full_store.manifest.query
    full_store.manifest.query = lambda *arguments: keys(*arguments)[::-1]
    with pytest.raises(StoreDamaged, match="keys are out of order"):
        list(full_store.manifest.sorted_keys())


@pytest.mark.parametrize("by_key", [0, 100])
def test_relisting_moves_pending_images_only(
    new_store: NewStore, monkeypatch: pytest.MonkeyPatch, by_key: int
) -> None:
    monkeypatch.setattr("mobilesam.store.store.RELISTED_BY_KEY", by_key)
    store = new_store()
    compute(store, embeddings(), shards=[0])
    store.relist([ImageRef(key=f"photo{row:04d}.jpg", size=7, offset=512) for row in range(8)])
    sizes = [(record.size, record.offset) for record in store.manifest.records(None)]
    assert sizes == [(100, None), (101, None), (102, None)] + [(7, 512)] * 5


def test_one_read_keeps_the_order_and_repeats_that_were_asked_for(full_store: EmbeddingStore) -> None:
    rows = [6, 1, 6, 0]
    np.testing.assert_array_equal(full_store.read(rows).values, embeddings()[rows].astype(np.float16))
    assert full_store.read([]).values.shape == (0, 256, 4, 4)
