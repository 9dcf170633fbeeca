"""Shard files being written, and what interrupted writing leaves.

Shape suffixes: C channels, H and W rows and columns of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from small_store import embeddings

from mobilesam.store import (
    EmbeddingStore,
    ShardWriter,
)

NewStore = Callable[..., EmbeddingStore]


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


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_values_that_float16_cannot_hold_are_refused(new_store: NewStore, bad: float) -> None:
    store = new_store()
    emb_CHW = embeddings()[0]
    emb_CHW[3, 2, 1] = bad
    with (
        ShardWriter(store.path, store.spec.layouts, 0, "attempt", 3) as writer,
        pytest.raises(ValueError, match=r"NaN or infinite|beyond float16's range"),
    ):
        writer.add(0, emb_CHW)


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
