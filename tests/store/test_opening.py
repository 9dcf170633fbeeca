"""Who may open what: places, permissions, locks, settings."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from small_store import EVERYTHING, HEAD, compute, embeddings, images, make_spec

from mobilesam.common.durable import explain_os_errors
from mobilesam.store import EmbeddingStore, StoreError, StoreLocked, StoreMismatch, StoreNotFound, exists
from mobilesam.store.layout import MANIFEST, PRIVATE
from mobilesam.store.lock import WriterLock
from mobilesam.store.zarr_metadata import documents_of

NewStore = Callable[..., EmbeddingStore]

HOLD_LOCK = """
import sys, time
from mobilesam.store import EmbeddingStore
store = EmbeddingStore.open(sys.argv[1], writable=True)
print("held", flush=True)
time.sleep(600)
"""


def _create(path: Path) -> EmbeddingStore:
    return EmbeddingStore.create(path, make_spec(), images(), EVERYTHING, HEAD)


def test_a_second_writer_is_refused_and_the_first_is_named(full_store: EmbeddingStore) -> None:
    with pytest.raises(StoreLocked, match=rf"process {os.getpid()} on "):
        EmbeddingStore.open(full_store.path, writable=True)


def test_readers_are_welcome_while_somebody_writes(full_store: EmbeddingStore) -> None:
    with EmbeddingStore.open(full_store.path) as reader:
        assert reader.manifest.counts().done == 8


def test_a_killed_writers_lock_falls_away(full_store: EmbeddingStore) -> None:
    full_store.close()
    writer = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(full_store.path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "held\n"
    with pytest.raises(StoreLocked, match=f"process {writer.pid}"):
        EmbeddingStore.open(full_store.path, writable=True)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    with EmbeddingStore.open(full_store.path, writable=True) as store:
        assert store.manifest.counts().done == 8


@pytest.mark.parametrize("left", [b'{"host": "here", "pid": 1}', b"", b"[]", b"\xff" * 9000])
def test_whatever_a_dead_owner_left_is_overwritten(full_store: EmbeddingStore, left: bytes) -> None:
    full_store.close()
    owner = full_store.path / PRIVATE / "writer.json"
    owner.write_bytes(left.replace(b"here", socket.gethostname().encode()))
    assert WriterLock(full_store.path / PRIVATE).live_owner() is None
    with EmbeddingStore.open(full_store.path, writable=True):
        mine = {"host": socket.gethostname(), "pid": os.getpid()}
        assert json.loads(owner.read_bytes()) == mine
        assert WriterLock(full_store.path / PRIVATE).live_owner() == mine
    assert not owner.exists()
    assert WriterLock(full_store.path / PRIVATE).live_owner() is None


def test_an_owner_of_another_host_counts_as_live_where_a_lock_need_not_reach_it(
    full_store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_store.close()
    (full_store.path / PRIVATE / "writer.json").write_text('{"host": "elsewhere", "pid": 7}')
    lock = WriterLock(full_store.path / PRIVATE)
    assert lock.live_owner() is None
    monkeypatch.setattr("mobilesam.store.lock._on_network", lambda path: True)
    assert lock.live_owner() == {"host": "elsewhere", "pid": 7}


@pytest.mark.parametrize(
    ("number", "mend"),
    [(errno.EIO, "the disk fails: check it"), (errno.ENOSPC, "free some room"), (errno.EMFILE, "ulimit -n")],
)
def test_what_the_system_refuses_is_told_with_its_mend(tmp_path: Path, number: int, mend: str) -> None:
    with pytest.raises(StoreError, match=mend) as caught, explain_os_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in str(caught.value)


def test_what_killed_attempts_left_is_removed_by_the_next_writer(full_store: EmbeddingStore) -> None:
    full_store.close()
    left = [
        "zarr.json.00c0ffee.partial",
        "embeddings/zarr.json.00c0ffee.partial",
        "embeddings/c.9.0.0.0.dead.partial",
        "embeddings/mobilesam/writer.json.00c0ffee.partial",
        "embeddings/mobilesam/sam_head.safetensors.00c0ffee.partial",
    ]
    for name in left:
        (full_store.path / name).write_bytes(b"x" * 100)
    EmbeddingStore.open(full_store.path, writable=True).close()
    assert not list(full_store.path.rglob("*.partial"))


def test_files_that_only_look_like_leftovers_are_left_alone(full_store: EmbeddingStore) -> None:
    full_store.close()
    others = [
        "notes.partial",
        "embeddings/c.9.0.0.0.dead.partial.txt",
        "embeddings/mobilesam/mine.json.partial",
    ]
    for name in others:
        (full_store.path / name).write_bytes(b"precious")
    (full_store.path / "embeddings" / "c.9.0.0.0.dead.partial").mkdir()
    EmbeddingStore.open(full_store.path, writable=True).close()
    assert [(full_store.path / name).read_bytes() for name in others] == [b"precious"] * 3
    assert (full_store.path / "embeddings" / "c.9.0.0.0.dead.partial").is_dir()


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


def test_an_abandoned_draft_is_removed_and_a_live_one_is_kept(tmp_path: Path) -> None:
    abandoned = tmp_path / "store.zarr.deadbeef.partial"
    (abandoned / PRIVATE).mkdir(parents=True)
    live = _create(tmp_path / "store.zarr.00000000.partial")
    with _create(tmp_path / "store.zarr"):
        assert not abandoned.exists()
        assert live.path.exists()
    live.close()


def test_create_leaves_no_draft_behind(tmp_path: Path) -> None:
    _create(tmp_path / "store.zarr").close()
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_in_the_way_is_neither_overwritten_nor_mixed_with(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "store.zarr"
    if kind == "folder":
        place.mkdir()
        (place / "precious").write_text("data")
    else:
        place.write_text("data")
    with pytest.raises(StoreError, match="exists and is no mobilesam store"):
        _create(place)
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr"]


def test_an_empty_folder_becomes_the_store(tmp_path: Path) -> None:
    (tmp_path / "store.zarr").mkdir()
    with _create(tmp_path / "store.zarr") as store:
        assert store.manifest.counts().pending == 8


@pytest.mark.parametrize("make", ["nothing", "folder", "file"])
def test_no_store_is_told_with_the_mend(tmp_path: Path, make: str) -> None:
    place = tmp_path / "store.zarr"
    if make == "folder":
        place.mkdir()
    if make == "file":
        place.write_text("x")
    assert not exists(place)
    with pytest.raises(StoreNotFound, match="store"):
        EmbeddingStore.open(place)


@pytest.mark.parametrize("url", ["s3://bucket/store.zarr", Path("gs://bucket/store.zarr")])
def test_urls_are_refused_clearly(url: str | Path) -> None:
    with pytest.raises(StoreError, match="not supported yet"):
        EmbeddingStore.open(url)


def test_every_difference_is_named_with_both_values(full_store: EmbeddingStore) -> None:
    wanted = {
        "teacher": "vit_h",
        "dtype": None,
        "image_size": 1024,
        "preprocessing": {"mean": [1.0, 2.0, 3.0], "filter": "nearest"},
        "shard_size": 3,
    }
    with pytest.raises(StoreMismatch) as caught:
        full_store.spec.refuse_differences(full_store.path, wanted)
    message = str(caught.value)
    assert "teacher: store 'vit_nano', asked 'vit_h'" in message
    assert "image_size: store 64, asked 1024" in message
    assert "preprocessing.filter: store 'bilinear', asked 'nearest'" in message
    assert "shard_size" not in message
    assert "dtype" not in message


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


def test_a_reader_in_a_forked_or_threaded_process_reads_the_same(full_store: EmbeddingStore) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with EmbeddingStore.open(full_store.path) as reader, ThreadPoolExecutor(8) as pool:
        rows = [row for row in range(8) for _ in range(20)]
        read = list(pool.map(lambda row: reader.read([row]).values[0], rows))
    expected = embeddings().astype(np.float16)
    assert all(np.array_equal(values, expected[row]) for values, row in zip(read, rows, strict=True))


def test_more_shards_than_may_be_open_are_read_all_the_same(
    new_store: NewStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobilesam.store.reader.OPEN_SHARDS", 2)
    store = new_store(rows=30)
    compute(store, embeddings(30))
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    read = store.read(list(range(29, -1, -1))).values
    assert len(list(descriptors.iterdir())) <= before + 2
    np.testing.assert_array_equal(read, embeddings(30)[::-1].astype(np.float16))


def test_a_writer_removes_the_journal_of_a_transaction_that_was_killed_before_it_changed_anything(
    full_store: EmbeddingStore,
) -> None:
    full_store.close()
    journal = full_store.path / f"{MANIFEST}-journal"
    journal.write_bytes(bytes(512))
    with EmbeddingStore.open(full_store.path, writable=True) as store:
        assert store.manifest.counts().done == 8
        assert not journal.exists()
