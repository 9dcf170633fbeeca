"""Commit, withdraw, extend, relist, the head: what is listed, and what is on disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from small_store import EVERYTHING, HEAD, compute, embeddings, images

from mobilesam.store import (
    Counts,
    EmbeddingStore,
    ImageRef,
    RowResult,
    StoreDamaged,
    StoreError,
    StoreMismatch,
)
from mobilesam.store.layout import HEAD as HEAD_FILE
from mobilesam.store.writer import CARRIED
from mobilesam.store.zarr_metadata import documents_of

NewStore = Callable[..., EmbeddingStore]


def _files(store: EmbeddingStore) -> dict[str, tuple[int, bytes]]:
    folder = store.path / "embeddings"
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in sorted(folder.glob("c.*"))}


def test_a_lost_head_is_restored_and_another_one_is_refused(full_store: EmbeddingStore) -> None:
    full_store.head_path.unlink()
    with pytest.raises(StoreMismatch, match=r"is not the one that .* was made with"):
        full_store.restore_head(HEAD + b" ")
    assert not full_store.head_path.exists()
    full_store.restore_head(HEAD)
    assert full_store.read_head() == HEAD


def test_a_new_store_has_only_pending_rows(new_store: NewStore) -> None:
    store = new_store()
    assert store.manifest.counts() == Counts(done=0, failed=0, pending=8)
    assert store.pending_shards() == [0, 1, 2]
    with pytest.raises(StoreError, match="no committed rows"):
        store.read([0])


def test_a_failed_row_is_listed_with_its_reason_and_never_read(new_store: NewStore) -> None:
    store = new_store()
    compute(store, embeddings(), failed=[4])
    assert store.manifest.counts() == Counts(done=7, failed=1, pending=0)
    assert [(record.row, record.reason) for record in store.manifest.records("failed")] == [(4, "truncated")]
    assert store.manifest.shards_with_failures() == [1]
    with pytest.raises(StoreError, match=r"row 4 .* is not done"):
        store.read([3, 4])


def test_an_unfinished_attempt_is_refused_and_the_shard_stays_pending(new_store: NewStore) -> None:
    store = new_store()
    partial = store.path / "embeddings" / "c.0.0.0.0.attempt.partial"
    partial.write_bytes(b"short")
    results = [RowResult(row=row, reason="none") for row in store.shard_rows(0)]
    with pytest.raises(StoreError, match="was written with 5 bytes instead of"):
        store.commit(0, "attempt", results)
    assert 0 in store.pending_shards()


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


def test_an_extension_cut_short_after_its_rows_is_finished_by_the_next_writer(
    full_store: EmbeddingStore,
) -> None:
    import zarr

    full_store.withdraw([2])
    full_store.manifest.append(images(9)[8:], EVERYTHING, partial(documents_of, full_store.spec))
    full_store.close()
    with EmbeddingStore.open(full_store.path, writable=True) as store:
        assert store.pending_shards() == [2]
        assert zarr.open_group(store.path, mode="r")["embeddings"].shape[0] == 9


def test_a_writer_forgets_the_carried_rows_of_shards_that_are_committed(full_store: EmbeddingStore) -> None:
    """Killed before the shard was withdrawn, after it was committed again, or while the rows were written."""
    folder = full_store.path / CARRIED
    full_store.withdraw([1, 2])
    kept = (folder / "1.json").read_bytes()
    (folder / "0.json").write_bytes(b"of a committed shard")
    (folder / "0.json.339ffebc.partial").write_bytes(b"cut short")
    (folder / "notes.txt").write_text("somebody else's")
    full_store.close()
    with EmbeddingStore.open(full_store.path, writable=True) as store:
        assert {path.name for path in folder.iterdir()} == {"1.json", "2.json", "notes.txt"}
        assert (folder / "1.json").read_bytes() == kept
        (folder / "notes.txt").unlink()
        compute(store, embeddings())
        assert not folder.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="drops privileges")
def test_a_reader_needs_no_write_access(full_store: EmbeddingStore) -> None:
    full_store.close()
    script = (
        "import sys, os, sqlite3\n"
        "from mobilesam.store import EmbeddingStore\n"
        "from mobilesam.store.inspection import inspect_store\n"
        "inspect_store(sys.argv[1], check=True)  # imports what this user may read, and the next may not\n"
        "os.setuid(65534)\n"
        "assert inspect_store(sys.argv[1], check=True)['problems'] == []\n"
        "print(EmbeddingStore.open(sys.argv[1]).read([7]).values.astype('float64').sum())\n"
    )
    # pytest's own folders are closed to other users.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        store = Path(shutil.copytree(full_store.path, Path(folder) / "store.zarr"))
        for path in [store, *store.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        done = subprocess.run(
            [sys.executable, "-c", script, str(store)], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == embeddings()[7].astype(np.float16).astype(np.float64).sum()


def test_a_changed_head_is_damage(full_store: EmbeddingStore) -> None:
    assert full_store.read_head() == (full_store.path / HEAD_FILE).read_bytes()
    (full_store.path / HEAD_FILE).write_bytes(b"other")
    with pytest.raises(StoreDamaged, match="sam_head"):
        full_store.read_head()
