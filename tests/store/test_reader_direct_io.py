"""Rows read past the system's cache, into buffers of the caller's, several at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_store import ROWS, compute

from mobilesam.store import EmbeddingStore, StoreDamaged, StoredBatch
from mobilesam.store.reader import O_DIRECT, Scratch, aligned_empty, is_aligned

NewStore = Callable[..., EmbeddingStore]
FIRST_SHARD = "embeddings/c.0.0.0.0"


@pytest.fixture
def preadv(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool, list[int], int]]:
    """What each positioned read was: past the cache; all buffers at pages; their lengths; offset."""
    calls = []
    plain = os.preadv

    def told(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        past_cache = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & O_DIRECT)
        aligned = all(is_aligned(np.frombuffer(buffer, np.uint8)) for buffer in buffers)
        calls.append((past_cache, aligned, [len(buffer) for buffer in buffers], offset))
        return plain(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", told)
    return calls


def full(new_store: NewStore, tmp_path: Path, **changes: Any) -> tuple[Path, np.ndarray]:
    """A store with all rows done, closed, and its rows as they are read through the cache."""
    with new_store(**changes) as store:
        side = store.spec.image_size // 16
        values = np.random.default_rng(0).normal(0, 3, (ROWS, 256, side, side)).astype(np.float32)
        compute(store, values)
    with EmbeddingStore.open(tmp_path / "store.zarr", direct_io=False) as store:
        return store.path, store.read(range(ROWS)).to_float32()


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_rows_past_the_cache_are_the_same_and_read_in_whole_pages(
    new_store: NewStore, tmp_path: Path, dtype: str, preadv: list[tuple[bool, bool, list[int], int]]
) -> None:
    path, expected = full(new_store, tmp_path, dtype=dtype)
    preadv.clear()
    with EmbeddingStore.open(path, direct_io=True) as store:
        order = [5, 0, 7, 7, 3]
        np.testing.assert_array_equal(store.read(order).to_float32(), expected[order])
        payload = store.spec.layouts[0].payload_bytes
    rows = [call for call in preadv if call[2][0] == payload]
    assert len(rows) == len(order)
    for past_cache, aligned, lengths, offset in rows:
        assert past_cache
        assert aligned
        assert lengths == [payload, 4096]
        assert offset % 4096 == 0
    assert len(preadv) == len(rows) * (2 if dtype == "int8" else 1), "scales go through the cache"


def test_a_buffer_that_starts_anywhere_is_filled_all_the_same(new_store: NewStore, tmp_path: Path) -> None:
    path, expected = full(new_store, tmp_path)
    memory = aligned_empty((2 * expected[0].size + 1,), np.float16)[1 : 2 * expected[0].size + 1]
    out = StoredBatch(memory.reshape(2, *expected.shape[1:]), None)
    assert not is_aligned(out.values)
    with EmbeddingStore.open(path, direct_io=True) as store:
        assert store.read([6, 1], out) is out
    np.testing.assert_array_equal(out.values, expected[[6, 1]])


def test_rows_that_are_not_whole_pages_go_through_the_cache(
    new_store: NewStore, tmp_path: Path, preadv: list[tuple[bool, bool, list[int], int]]
) -> None:
    path, expected = full(new_store, tmp_path, image_size=48)
    preadv.clear()
    with EmbeddingStore.open(path, direct_io=True) as store:
        np.testing.assert_array_equal(store.read([2, 4]).values, expected[[2, 4]])
    assert [call[0] for call in preadv] == [False, False]


def test_a_file_system_that_refuses_the_first_direct_read_is_read_through_the_cache(
    new_store: NewStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = full(new_store, tmp_path)
    plain, refused = os.preadv, []

    def picky(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & O_DIRECT:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", picky)
    with EmbeddingStore.open(path, direct_io=True) as store:
        np.testing.assert_array_equal(store.read([0]).values, expected[:1])
        np.testing.assert_array_equal(store.read([1]).values, expected[1:2])
    assert len(refused) == 1, "it isn't asked again"


def test_a_file_system_without_it_is_read_through_the_cache(
    new_store: NewStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = full(new_store, tmp_path)
    plain = fcntl.fcntl

    def without(descriptor: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(descriptor, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", without)
    with EmbeddingStore.open(path, direct_io=True) as store:
        np.testing.assert_array_equal(store.read(range(ROWS)).values, expected)


@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: os.pwrite(file, b"\xff\xff\xff", 100), "row 0"),
        (lambda file: os.pwrite(file, b"\xff\xff\xff", 8192), "row 0"),
        (lambda file: os.ftruncate(file, 5000), "c.0.0.0.0"),
    ],
)
def test_damage_is_an_error_with_and_without_direct_io(
    new_store: NewStore,
    tmp_path: Path,
    direct_io: bool,
    damage: Callable[[int], object],
    message: str,
) -> None:
    path, expected = full(new_store, tmp_path)
    file = os.open(path / FIRST_SHARD, os.O_WRONLY)
    damage(file)
    os.close(file)
    with EmbeddingStore.open(path, direct_io=direct_io) as store:
        with pytest.raises(StoreDamaged, match=message):
            store.read([4, 0, 5])
        np.testing.assert_array_equal(store.read([4]).values, expected[4:5])


def test_a_file_cut_short_after_it_was_opened_is_an_error(new_store: NewStore, tmp_path: Path) -> None:
    path, _ = full(new_store, tmp_path)
    with EmbeddingStore.open(path, direct_io=True) as store:
        store.read([0])
        os.truncate(path / FIRST_SHARD, 5000)
        with pytest.raises(StoreDamaged, match=r"c\.0\.0\.0\.0"):
            store.read([0])


def test_by_default_only_what_memory_cannot_keep_is_read_past_the_cache(
    new_store: NewStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preadv: list[tuple[bool, bool, list[int], int]],
) -> None:
    path, _ = full(new_store, tmp_path)
    size = ROWS * 12288
    for memory, past_cache in ((2 * size, False), (2 * size - 4096, True)):
        answers = {"SC_PHYS_PAGES": memory // 4096, "SC_PAGE_SIZE": 4096}
        monkeypatch.setattr(os, "sysconf", answers.__getitem__)
        preadv.clear()
        with EmbeddingStore.open(path) as store:
            store.read([0])
        assert preadv[0][0] is past_cache


def test_a_batch_that_is_not_the_stores_is_refused(new_store: NewStore, tmp_path: Path) -> None:
    path, _ = full(new_store, tmp_path)
    with EmbeddingStore.open(path) as store:
        good = store.reader.empty_batch(2)
        wrong = [
            StoredBatch(good.values[:1], None),
            StoredBatch(good.values.astype(np.float32), None),
            StoredBatch(good.values, np.zeros((2, 256), np.float32)),
            StoredBatch(good.values.transpose(0, 1, 3, 2), None),
        ]
        for out in wrong:
            with pytest.raises(ValueError, match="a batch of 2 rows of this store"):
                store.read([0, 1], out)
        good.values.setflags(write=False)
        with pytest.raises(ValueError, match="a batch of 2 rows of this store"):
            store.read([0, 1], good)


def test_a_batch_takes_no_more_memory_than_itself(new_store: NewStore, tmp_path: Path) -> None:
    path, expected = full(new_store, tmp_path, image_size=512)
    with EmbeddingStore.open(path, direct_io=True) as store:
        store.read([0, 3])
        tracemalloc.start()
        batch = store.read(range(ROWS))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak <= 1.1 * batch.values.nbytes
    np.testing.assert_array_equal(batch.values, expected)


def test_several_rows_are_read_at_a_time(
    new_store: NewStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = full(new_store, tmp_path)
    together = threading.Barrier(2)
    plain = os.preadv

    def met(*arguments: Any) -> int:
        together.wait(timeout=60)  # for another read: alone, this would break
        return plain(*arguments)

    monkeypatch.setattr(os, "preadv", met)
    with EmbeddingStore.open(path) as store:
        np.testing.assert_array_equal(store.read([0, 1, 2, 3]).values, expected[:4])


def test_no_thread_and_no_file_is_left_by_a_closed_store(new_store: NewStore, tmp_path: Path) -> None:
    path, _ = full(new_store, tmp_path)
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    store = EmbeddingStore.open(path, direct_io=True)
    store.read(range(ROWS))
    store.close()
    assert len(os.listdir("/proc/self/fd")) == files
    assert threading.active_count() == threads


def test_each_thread_has_scratch_of_its_own() -> None:
    scratch = Scratch()
    mine = scratch.take("row", 100)
    mine[:] = 1
    theirs: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: theirs.append(scratch.take("row", 100)))
    thread.start()
    thread.join()
    theirs[0][:] = 2
    assert (mine == 1).all()
    assert is_aligned(mine)
    assert np.shares_memory(mine, scratch.take("row", 50))
    assert len(scratch.take("row", 5000)) == 5000
