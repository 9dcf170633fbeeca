"""No flipped bit and no swapped file is read as an embedding."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_store import compute, embeddings, make_spec

from mobilesam.store import EmbeddingStore, StoreDamaged, StoreError, StoreNotFound, exists
from mobilesam.store.layout import HEAD, MANIFEST

NewStore = Callable[..., EmbeddingStore]


def _shard(store: EmbeddingStore, number: int, array: str = "embeddings") -> Path:
    return store.path / array / store.spec.layouts[0 if array == "embeddings" else 1].file_name(number)


def _read_anew(path: Path, rows: list[int]) -> np.ndarray:
    with EmbeddingStore.open(path) as store:
        return store.read(rows).values


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
                _read_anew(full_store.path, [0, 1, 2]), embeddings()[:3].astype(np.float16)
            )
        else:
            with pytest.raises(StoreDamaged):
                _read_anew(full_store.path, [0, 1, 2])
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("array", ["embeddings", "scales"])
def test_two_swapped_shards_are_told_by_the_manifest(new_store: NewStore, array: str) -> None:
    store = new_store(dtype="int8")
    compute(store, embeddings())
    first, second = _shard(store, 0, array), _shard(store, 1, array)
    aside = first.with_suffix(".aside")
    shutil.move(first, aside)
    shutil.move(second, first)
    shutil.move(aside, second)
    with pytest.raises(StoreDamaged, match=r"row 1 \('photo0001.jpg'\).*not those that were committed"):
        _read_anew(store.path, [1])


def test_a_shard_of_another_store_is_told_by_the_manifest(new_store: NewStore) -> None:
    store, other = new_store("a.zarr"), new_store("b.zarr")
    compute(store, embeddings(seed=0))
    compute(other, embeddings(seed=1))
    shutil.copy(_shard(other, 2), _shard(store, 2))
    with pytest.raises(StoreDamaged, match="row 6"):
        _read_anew(store.path, [6])


def test_a_stale_copy_of_the_same_shard_is_told_by_the_manifest(full_store: EmbeddingStore) -> None:
    stale = _shard(full_store, 0).read_bytes()
    full_store.withdraw([0])
    compute(full_store, embeddings(seed=5))
    _shard(full_store, 0).write_bytes(stale)
    with pytest.raises(StoreDamaged, match="not those that were committed"):
        _read_anew(full_store.path, [0])


@pytest.mark.parametrize("keep", [0, 1, 5000, -1])
def test_a_cut_shard_is_damage(full_store: EmbeddingStore, keep: int) -> None:
    file = _shard(full_store, 1)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(StoreDamaged, match=r"c\.1\.0\.0\.0"):
        _read_anew(full_store.path, [3])


def test_a_missing_shard_is_damage_and_the_others_are_read(full_store: EmbeddingStore) -> None:
    _shard(full_store, 1).unlink()
    with pytest.raises(StoreDamaged, match="is missing, though the manifest lists it"):
        _read_anew(full_store.path, [3])
    assert _read_anew(full_store.path, [0, 7]).shape[0] == 2


def test_a_manifest_of_another_store_is_refused(new_store: NewStore) -> None:
    store, other = new_store("a.zarr"), new_store("b.zarr")
    shutil.copy(other.path / MANIFEST, store.path / MANIFEST)
    with pytest.raises(StoreDamaged, match="belongs to store"):
        EmbeddingStore.open(store.path)


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to be one" * 99])
def test_a_damaged_manifest_is_told(full_store: EmbeddingStore, content: bytes) -> None:
    full_store.close()
    (full_store.path / MANIFEST).write_bytes(content)
    with pytest.raises(StoreDamaged, match=r"manifest\.sqlite"):
        EmbeddingStore.open(full_store.path)


def test_a_missing_manifest_is_told(full_store: EmbeddingStore) -> None:
    full_store.close()
    (full_store.path / MANIFEST).unlink()
    with pytest.raises(StoreDamaged, match="manifest"):
        EmbeddingStore.open(full_store.path)


def test_a_changed_head_is_told(full_store: EmbeddingStore) -> None:
    assert full_store.read_head() == (full_store.path / HEAD).read_bytes()
    (full_store.path / HEAD).write_bytes(b"other")
    with pytest.raises(StoreDamaged, match="sam_head"):
        full_store.read_head()


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"attributes": {"mobilesam": 1}}'])
def test_a_damaged_group_document_is_told(full_store: EmbeddingStore, content: bytes) -> None:
    (full_store.path / "zarr.json").write_bytes(content)
    with pytest.raises((StoreDamaged, StoreNotFound), match="zarr"):
        EmbeddingStore.open(full_store.path)


@pytest.mark.parametrize("content", [None, b"{}", b'{"attributes": {"other": 1}}'])
def test_a_store_that_lost_its_group_document_is_damaged_rather_than_none(
    full_store: EmbeddingStore, content: bytes | None
) -> None:
    document = full_store.path / "zarr.json"
    document.unlink() if content is None else document.write_bytes(content)
    with pytest.raises(
        StoreDamaged, match=r"with a manifest, .*: put it back with mobilesam inspect STORE --repair"
    ):
        EmbeddingStore.open(full_store.path)
    with pytest.raises(StoreDamaged):
        exists(full_store.path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_root", "/other"),
        ("precision", "bfloat16"),
        ("teacher", "vit_h"),
        ("shard_size", 4),
        ("shard_size", "3"),
    ],
)
def test_a_changed_attribute_is_told(full_store: EmbeddingStore, name: str, value: object) -> None:
    path = full_store.path / "zarr.json"
    document = json.loads(path.read_bytes())
    assert document["attributes"]["mobilesam"][name] != value
    document["attributes"]["mobilesam"][name] = value
    path.write_text(json.dumps(document))
    with pytest.raises(StoreDamaged, match=r"attributes .*zarr\.json"):
        EmbeddingStore.open(full_store.path)


def test_a_document_that_cant_be_read_is_not_taken_for_absence(
    full_store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(StoreError, match="Permission denied; check its permissions") as caught:
        exists(full_store.path)
    assert not isinstance(caught.value, StoreNotFound)


def test_attributes_survive_their_own_json() -> None:
    spec = make_spec(dtype="int8")
    assert type(spec).from_json(spec.to_json()) == spec
