from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_store import EVERYTHING, HEAD, ROWS, compute, embeddings, images, make_spec

from mobilesam.store import EmbeddingStore


@pytest.fixture
def new_store(tmp_path: Path) -> Iterator[Callable[..., EmbeddingStore]]:
    """Makes a store with 8 pending rows, open for writing; closed at the end of the test."""
    opened = []

    def make(name: str = "store.zarr", rows: int = ROWS, **changes: object) -> EmbeddingStore:
        store = EmbeddingStore.create(tmp_path / name, make_spec(**changes), images(rows), EVERYTHING, HEAD)
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def full_store(new_store: Callable[..., EmbeddingStore]) -> EmbeddingStore:
    """A float16 store with all 8 rows done, open for writing."""
    store = new_store()
    compute(store, embeddings())
    return store


@pytest.fixture
def store(new_store: Callable[..., EmbeddingStore]) -> EmbeddingStore:
    """An int8 store (two arrays), row 4 failed, closed."""
    store = new_store(dtype="int8")
    compute(store, embeddings(), failed=[4])
    store.close()
    return store
