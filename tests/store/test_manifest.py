"""Content of the manifest: keys, records, selections, audits."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from small_store import EVERYTHING, HEAD, compute, embeddings, images, make_spec

from mobilesam.store import (
    Audit,
    EmbeddingStore,
    ImageRef,
    Selection,
    StoreDamaged,
    StoreError,
)
from mobilesam.store.layout import MANIFEST
from mobilesam.store.manifest import Manifest

NewStore = Callable[..., EmbeddingStore]


def _audit(row: int, cosine: float = 1.0, relative_mse: float = 0.0) -> Audit:
    return Audit(row=row, cosine=cosine, relative_mse=relative_mse)


@pytest.fixture
def store(new_store: NewStore) -> EmbeddingStore:
    """An int8 store (two arrays), row 4 failed, closed."""
    store = new_store(dtype="int8")
    compute(store, embeddings(), failed=[4])
    store.close()
    return store


def test_audits_are_kept_in_row_order_and_replaced_by_newer_ones(full_store: EmbeddingStore) -> None:
    full_store.record_audits([_audit(5, 0.5), _audit(1)])
    full_store.record_audits([_audit(5, 0.75)])
    with EmbeddingStore.open(full_store.path) as reader:
        assert reader.manifest.audits() == [_audit(1), _audit(5, 0.75)]


def test_an_audit_goes_when_its_shard_is_withdrawn(full_store: EmbeddingStore) -> None:
    full_store.record_audits([_audit(0), _audit(4), _audit(7)])
    full_store.withdraw([1])
    assert [audit.row for audit in full_store.manifest.audits()] == [0, 7]


@pytest.mark.parametrize("row", [4, 7, 99])
def test_a_row_that_is_not_done_cant_have_been_audited(new_store: NewStore, row: int) -> None:
    store = new_store()
    compute(store, embeddings(), failed=[4], shards=[0, 1])
    with pytest.raises(StoreError, match=f"row {row} .* is not done"):
        store.record_audits([_audit(0), _audit(row)])
    assert store.manifest.audits() == []


def test_records_hold_what_the_worker_found_out(full_store: EmbeddingStore) -> None:
    record = full_store.manifest.records()[5]
    assert (record.row, record.key, record.status) == (5, "photo0005.jpg", "done")
    assert (record.bytes, record.original_size, record.resized_size) == (105, (30, 40), (48, 64))
    assert record.sha256 == f"{5:064x}"


def test_a_key_twice_is_refused_without_calling_the_store_damaged(full_store: EmbeddingStore) -> None:
    with pytest.raises(StoreError, match="nothing was changed") as caught:
        full_store.manifest.append(images(1), EVERYTHING, lambda rows: {})
    assert not isinstance(caught.value, StoreDamaged)


def test_keys_come_back_whatever_their_bytes(tmp_path: Path) -> None:

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


def test_a_manifest_of_another_store_is_refused(new_store: NewStore) -> None:
    store, other = new_store("a.zarr"), new_store("b.zarr")
    shutil.copy(other.path / MANIFEST, store.path / MANIFEST)
    with pytest.raises(StoreDamaged, match="belongs to store"):
        EmbeddingStore.open(store.path)


def test_a_manifest_is_closed_when_no_thread_is_at_it_any_more(store: EmbeddingStore) -> None:
    manifest = Manifest(store.path / MANIFEST)
    held, closed = threading.Event(), threading.Event()

    def close() -> None:
        held.wait()
        manifest.close()
        closed.set()

    thread = threading.Thread(target=close)
    thread.start()
    with manifest.snapshot():
        held.set()
        assert not closed.wait(0.2)
        assert manifest.query("SELECT count(*) FROM images") == [(8,)]
    thread.join()
    assert closed.is_set()
