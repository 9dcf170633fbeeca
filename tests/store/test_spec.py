"""The description of a store, compared with what is asked for."""

from __future__ import annotations

import pytest
from small_store import make_spec

from mobilesam.store import (
    EmbeddingStore,
    StoreMismatch,
)


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


def test_attributes_survive_their_own_json() -> None:
    spec = make_spec(dtype="int8")
    assert type(spec).from_json(spec.to_json()) == spec
