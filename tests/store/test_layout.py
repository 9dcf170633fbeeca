"""Arithmetic of shards, slots and bytes; places of stores."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilesam.store import (
    EmbeddingStore,
    StoreError,
    array_layouts,
    rows_of,
    shard_count,
)
from mobilesam.store.checksum import crc32c
from mobilesam.store.layout import ALIGNMENT, EMPTY, shard_of


@given(rows=st.integers(0, 5000), shard_size=st.integers(1, 300))
def test_shards_partition_the_rows_in_order(rows: int, shard_size: int) -> None:
    listed = [
        row for shard in range(shard_count(rows, shard_size)) for row in rows_of(shard, shard_size, rows)
    ]
    assert listed == list(range(rows))
    assert all(row in rows_of(shard_of(row, shard_size), shard_size, rows) for row in range(0, rows, 7))


@pytest.mark.parametrize(
    ("dtype", "payload"), [("float16", 2 * 2**20), ("float32", 4 * 2**20), ("int8", 2**20)]
)
def test_a_row_at_1024_has_the_published_size_and_starts_at_a_page(dtype: str, payload: int) -> None:
    embeddings = array_layouts(dtype, 1024, 64)[0]
    assert embeddings.payload_bytes == payload
    assert embeddings.stride % ALIGNMENT == 0
    assert payload + 4 <= embeddings.stride < payload + 4 + ALIGNMENT
    assert embeddings.file_bytes(64) == 64 * embeddings.stride + 64 * 16 + 4


def test_alignment_costs_under_a_quarter_percent_of_float16() -> None:
    layout = array_layouts("float16", 1024, 64)[0]
    assert layout.stride / layout.payload_bytes < 1.0025


@given(slots=st.sets(st.integers(0, 63)))
def test_the_index_lists_exactly_the_slots_in_use(slots: set[int]) -> None:
    layout = array_layouts("float16", 256, 64)[0]
    index = layout.decode_index(layout.encode_index(slots))
    for slot in range(64):
        if slot in slots:
            assert tuple(index[slot]) == (slot * layout.stride, layout.payload_bytes + 4)
        else:
            assert tuple(index[slot]) == (EMPTY, EMPTY)


@given(bit=st.integers(0, 8 * (16 * 8 + 4) - 1))
def test_any_flipped_bit_in_the_index_is_noticed(bit: int) -> None:
    layout = array_layouts("float16", 64, 8)[0]
    data = bytearray(layout.encode_index(range(5)))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match="checksum"):
        layout.decode_index(bytes(data))


def test_crc32c_is_castagnoli_by_its_published_check_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283


@pytest.mark.parametrize(
    ("dtype", "names"), [("float16", ["embeddings"]), ("int8", ["embeddings", "scales"])]
)
def test_int8_has_scales_beside_it(dtype: str, names: list[str]) -> None:
    layouts = array_layouts(dtype, 1024, 64)
    assert [layout.name for layout in layouts] == names
    assert math.prod(layouts[-1].item_shape) in (256, 256 * 64 * 64)


@pytest.mark.parametrize("url", ["s3://bucket/store.zarr", Path("gs://bucket/store.zarr")])
def test_urls_are_refused_clearly(url: str | Path) -> None:
    with pytest.raises(StoreError, match="not supported yet"):
        EmbeddingStore.open(url)
