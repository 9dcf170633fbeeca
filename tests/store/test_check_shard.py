"""Damage to one shard, found and named.

Shape suffixes: C channels, H and W rows and columns of an embedding.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_store import EVERYTHING, HEAD, compute, embeddings, images, make_spec
from store_damage import flip_byte, found_problems, run_sql, shard_file

from mobilesam.store import (
    EmbeddingStore,
    RowResult,
    ShardWriter,
    StoreDamaged,
    StoreError,
)
from mobilesam.store.check_shard import check_shard, shard_listing
from mobilesam.store.checksum import crc32c
from mobilesam.store.inspection import inspect_store

NewStore = Callable[..., EmbeddingStore]


def _commit_value(store: EmbeddingStore, bad: float) -> None:
    """Commit shard 0 as a writer without the test for finite values would."""
    results = []
    layouts = store.spec.layouts
    with ShardWriter(store.path, layouts, 0, "a", 3) as writer:
        for row in range(3):
            stored = writer.add(row, embeddings()[row])
            results.append(
                RowResult(row=row, sha256="00", crc32c=stored.crc32c, scales_crc32c=stored.scales_crc32c)
            )
        writer.finish()
    layout = layouts[-1]
    path = store.path / layout.name / f"{layout.file_name(0)}.a.partial"
    data = bytearray(path.read_bytes())
    values = np.frombuffer(data, layout.dtype, layout.payload_bytes // layout.dtype.itemsize, layout.stride)
    values[5] = bad
    checksum = crc32c(values)
    start = layout.stride + layout.payload_bytes
    data[start : start + 4] = checksum.to_bytes(4, "little")
    path.write_bytes(data)
    changed = {"scales_crc32c" if layout.name == "scales" else "crc32c": checksum}
    results[1] = replace(results[1], **changed)
    store.commit(0, "a", results)


def test_a_missing_shard_is_one_problem(store: EmbeddingStore) -> None:
    shard_file(store, 1).unlink()
    (problem,) = inspect_store(store.path, check=True)["problems"]
    assert (problem["kind"], problem["shard"], problem["file"]) == ("missing", 1, str(shard_file(store, 1)))
    assert problem["message"] == "the file is missing: 2 images are lost"


@pytest.mark.parametrize("size", [0, 1, 4095, -1])
@pytest.mark.parametrize("array", [0, 1])
def test_a_file_of_another_length_is_short(store: EmbeddingStore, size: int, array: int) -> None:
    path = shard_file(store, 2, array)
    path.write_bytes(path.read_bytes()[:size] if size <= 0 else path.read_bytes() + b"x" * size)
    assert found_problems(store) == [("short", 2, None)]


def test_a_file_of_zero_bytes_is_reported_as_such(store: EmbeddingStore) -> None:
    path = shard_file(store, 0, 1)
    path.write_bytes(bytes(path.stat().st_size))
    assert found_problems(store) == [("zeros", 0, None)]


def test_zero_bytes_in_a_rows_place_are_reported_as_such(store: EmbeddingStore) -> None:
    path, layout = shard_file(store, 1), store.spec.layouts[0]
    data = bytearray(path.read_bytes())
    data[2 * layout.stride : 3 * layout.stride] = bytes(layout.stride)
    path.write_bytes(data)
    assert found_problems(store) == [("zeros", 1, 5)]


def test_an_embedding_of_zeros_is_no_damage(new_store: NewStore) -> None:
    store = new_store()
    compute(store, np.zeros_like(embeddings()))
    store.close()
    assert found_problems(store) == []


@pytest.mark.parametrize("array", [0, 1])
def test_a_flipped_bit_names_the_row_and_its_image(store: EmbeddingStore, array: int) -> None:
    layout = store.spec.layouts[array]
    flip_byte(shard_file(store, 2, array), layout.stride + layout.payload_bytes - 1)
    (problem,) = inspect_store(store.path, check=True)["problems"]
    assert (problem["kind"], problem["row"], problem["key"]) == ("checksum", 7, "photo0007.jpg")


def test_a_flipped_bit_in_the_checksum_behind_a_row_or_in_the_index_is_found(store: EmbeddingStore) -> None:
    layout = store.spec.layouts[0]
    flip_byte(shard_file(store, 0), layout.payload_bytes)
    flip_byte(shard_file(store, 2), -1)
    assert found_problems(store) == [("checksum", 0, 0), ("checksum", 2, None)]


def test_a_flipped_bit_in_padding_is_no_damage(store: EmbeddingStore) -> None:
    flip_byte(shard_file(store, 0), store.spec.layouts[0].payload_bytes + 4)
    assert found_problems(store) == []


def test_a_stale_file_in_which_other_images_failed_contradicts_the_listing(new_store: NewStore) -> None:
    store = new_store()
    compute(store, embeddings(), failed=[4])
    stale = shard_file(store, 1).read_bytes()
    store.withdraw([1])
    compute(store, embeddings(), failed=[3])
    shard_file(store, 1).write_bytes(stale)
    store.close()
    assert found_problems(store) == [("listing", 1, 3), ("listing", 1, 4)]


def test_nan_and_infinity_are_found_though_every_checksum_is_right(new_store: NewStore) -> None:
    for number, (dtype, bad) in enumerate(
        [("float16", np.nan), ("float16", -np.inf), ("float32", np.inf), ("int8", np.nan)]
    ):
        store = new_store(f"{number}.zarr", dtype=dtype)
        _commit_value(store, bad)
        store.close()
        assert found_problems(store) == [("not-finite", 0, 1)], (dtype, bad)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE results SET crc32c = crc32c + 1 WHERE row = 3",
        "UPDATE results SET width = 41 WHERE row = 3",
        "UPDATE results SET sha256 = x'00' WHERE row = 3",
        "UPDATE results SET reason = 'no' WHERE row = 3",
        "UPDATE images SET size = 7 WHERE row = 3",
    ],
)
def test_a_changed_field_of_a_listed_row_names_the_row(store: EmbeddingStore, statement: str) -> None:
    run_sql(store, statement)
    assert found_problems(store) == [("listing", 1, 3)]
    with EmbeddingStore.open(store.path) as reader, pytest.raises(StoreDamaged, match="row 3 is damaged"):
        reader.manifest.records(None)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE shards SET attempt = 'x' WHERE shard = 1",
        "UPDATE shards SET rows = 2 WHERE shard = 1",
        "UPDATE shards SET done = 3, failed = 0 WHERE shard = 1",
        "DELETE FROM results WHERE row = 3",
        "DELETE FROM shards WHERE shard = 1",
        "UPDATE shards SET rows = 'many' WHERE shard = 1",
    ],
)
def test_a_listing_that_contradicts_itself_is_found(store: EmbeddingStore, statement: str) -> None:
    run_sql(store, statement)
    assert ("listing", 1, None) in found_problems(store)
    assert {shard for _, shard, _ in found_problems(store)} == {1}


def test_a_failing_disk_under_one_shard_is_that_shards_problem(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, real = shard_file(store, 1).stat().st_ino, os.preadv

    def failing(descriptor: int, *arguments: Any) -> int:
        if os.fstat(descriptor).st_ino == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, *arguments)

    monkeypatch.setattr(os, "preadv", failing)
    flip_byte(shard_file(store, 2), 0)
    assert found_problems(store) == [("unreadable", 1, None), ("checksum", 2, 6)]


def test_a_shard_that_may_not_be_read_is_an_error_rather_than_damage(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def denied(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("c.1.0.0.0"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(StoreError, match=r"c\.1\.0\.0\.0: Permission denied; check its permissions"):
        inspect_store(store.path, check=True)


def test_a_shard_is_checked_in_the_memory_of_one_row(tmp_path: Path) -> None:
    import tracemalloc

    rows, spec = 24, make_spec(shard_size=24, image_size=512, dtype="float32")
    path, emb_CHW = tmp_path / "s.zarr", np.zeros((256, 32, 32), np.float32)
    with EmbeddingStore.create(path, spec, images(rows), EVERYTHING, HEAD) as store:
        compute(store, np.broadcast_to(emb_CHW, (rows, *emb_CHW.shape)))
        listing = shard_listing(store.manifest, 0, rows)
    assert listing is not None
    tracemalloc.start()
    assert check_shard(path, spec, listing) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * emb_CHW.nbytes
