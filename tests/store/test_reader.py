"""Rows read back: no flipped bit and no swapped file is read as an embedding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_store import EVERYTHING, compute, embeddings, images

from mobilesam.store import (
    EmbeddingStore,
    StoreDamaged,
    StoreError,
)

NewStore = Callable[..., EmbeddingStore]


def _shard(store: EmbeddingStore, number: int, array: str = "embeddings") -> Path:
    return store.path / array / store.spec.layouts[0 if array == "embeddings" else 1].file_name(number)


def _read_rows(path: Path, rows: list[int]) -> np.ndarray:
    with EmbeddingStore.open(path) as store:
        return store.read(rows).values


def test_float32_comes_back_as_it_went_in(new_store: NewStore) -> None:
    store = new_store(dtype="float32")
    compute(store, embeddings())
    np.testing.assert_array_equal(store.read([7, 0, 3, 3]).values, embeddings()[[7, 0, 3, 3]])


def test_float16_is_the_nearest_float16(full_store: EmbeddingStore) -> None:
    np.testing.assert_array_equal(full_store.read(range(8)).values, embeddings().astype(np.float16))


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


def test_one_read_keeps_the_order_and_repeats_that_were_asked_for(full_store: EmbeddingStore) -> None:
    rows = [6, 1, 6, 0]
    np.testing.assert_array_equal(full_store.read(rows).values, embeddings()[rows].astype(np.float16))
    assert full_store.read([]).values.shape == (0, 256, 4, 4)


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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_is_an_error_or_lies_in_padding(
    full_store: EmbeddingStore, data: st.DataObject
) -> None:
    file = _shard(full_store, 0)
    whole = file.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    broken = bytearray(whole)
    broken[bit // 8] ^= 1 << bit % 8
    file.write_bytes(broken)
    layout = full_store.spec.layouts[0]
    in_padding = bit // 8 < 3 * layout.stride and bit // 8 % layout.stride >= layout.payload_bytes + 4
    try:
        if in_padding:
            np.testing.assert_array_equal(
                _read_rows(full_store.path, [0, 1, 2]), embeddings()[:3].astype(np.float16)
            )
        else:
            with pytest.raises(StoreDamaged):
                _read_rows(full_store.path, [0, 1, 2])
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("array", ["embeddings", "scales"])
def test_two_swapped_shards_are_detected_by_the_manifest(new_store: NewStore, array: str) -> None:
    store = new_store(dtype="int8")
    compute(store, embeddings())
    first, second = _shard(store, 0, array), _shard(store, 1, array)
    aside = first.with_suffix(".aside")
    shutil.move(first, aside)
    shutil.move(second, first)
    shutil.move(aside, second)
    with pytest.raises(StoreDamaged, match=r"row 1 \('photo0001.jpg'\).*not those that were committed"):
        _read_rows(store.path, [1])


def test_a_shard_of_another_store_is_detected_by_the_manifest(new_store: NewStore) -> None:
    store, other = new_store("a.zarr"), new_store("b.zarr")
    compute(store, embeddings(seed=0))
    compute(other, embeddings(seed=1))
    shutil.copy(_shard(other, 2), _shard(store, 2))
    with pytest.raises(StoreDamaged, match="row 6"):
        _read_rows(store.path, [6])


def test_a_stale_copy_of_the_same_shard_is_detected_by_the_manifest(full_store: EmbeddingStore) -> None:
    stale = _shard(full_store, 0).read_bytes()
    full_store.withdraw([0])
    compute(full_store, embeddings(seed=5))
    _shard(full_store, 0).write_bytes(stale)
    with pytest.raises(StoreDamaged, match="not those that were committed"):
        _read_rows(full_store.path, [0])


@pytest.mark.parametrize("keep", [0, 1, 5000, -1])
def test_a_cut_shard_is_damage(full_store: EmbeddingStore, keep: int) -> None:
    file = _shard(full_store, 1)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(StoreDamaged, match=r"c\.1\.0\.0\.0"):
        _read_rows(full_store.path, [3])


def test_a_missing_shard_is_damage_and_the_others_are_read(full_store: EmbeddingStore) -> None:
    _shard(full_store, 1).unlink()
    with pytest.raises(StoreDamaged, match="is missing, though the manifest lists it"):
        _read_rows(full_store.path, [3])
    assert _read_rows(full_store.path, [0, 7]).shape[0] == 2
