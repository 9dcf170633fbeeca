"""The zarr.json files: what they say, damage to them, and the same store read by readers that we did not write.

Shape suffixes: B rows of a store, C channels, H and W rows and columns of an embedding.
"""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from small_store import EVERYTHING, compute, embeddings, images

from mobilesam.store import (
    DTYPES,
    EmbeddingStore,
    StoreDamaged,
    StoreError,
    StoreNotFound,
    exists,
)
from mobilesam.store.layout import ALIGNMENT

FAILED = 4
DONE = [row for row in range(8) if row != FAILED]


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(params=DTYPES)
def store(request: pytest.FixtureRequest, new_store: Callable[..., EmbeddingStore]) -> EmbeddingStore:
    """Row 4 failed, row 5 is zeros throughout."""
    store = new_store(dtype=request.param)
    emb_BCHW = embeddings()
    emb_BCHW[5] = 0
    compute(store, emb_BCHW, failed=[FAILED])
    return store


def _arrays(store: EmbeddingStore) -> list[str]:
    return [layout.name for layout in store.spec.layouts]


def test_zarr_reads_every_row_equal_to_the_bit(store: EmbeddingStore) -> None:
    group = zarr.open_group(store.path, mode="r")
    assert dict(group.members()).keys() == set(_arrays(store))
    ours = store.read(DONE)
    np.testing.assert_array_equal(group["embeddings"][:][DONE], ours.values)
    if ours.scales is not None:
        np.testing.assert_array_equal(group["scales"][:][DONE], ours.scales)


def test_tensorstore_reads_every_row_equal_to_the_bit(store: EmbeddingStore) -> None:
    ours = store.read(DONE)
    for name, expected in zip(_arrays(store), (ours.values, ours.scales), strict=False):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store.path / name}/"}}
        theirs = tensorstore.open(spec, open=True).result().read().result()
        np.testing.assert_array_equal(theirs[DONE], expected)


def test_xarray_opens_it_with_our_dimensions(store: EmbeddingStore) -> None:
    data = xarray.open_zarr(store.path)
    assert data["embeddings"].dims == ("row", "channel", "y", "x")
    assert data.sizes == {"row": 8, "channel": 256, "y": 4, "x": 4}


def test_a_row_that_is_not_there_reads_as_nan_elsewhere(store: EmbeddingStore) -> None:
    array = zarr.open_group(store.path, mode="r")["embeddings" if store.spec.dtype != "int8" else "scales"]
    assert np.isnan(array[FAILED]).all()


def test_a_row_of_zeros_is_written_and_not_taken_for_absent(store: EmbeddingStore) -> None:
    assert not store.read([5]).to_float32().any()
    array = zarr.open_group(store.path, mode="r")["embeddings" if store.spec.dtype != "int8" else "scales"]
    assert not np.isnan(array[5]).any()


def test_pending_shards_read_as_nan_elsewhere(new_store: Callable[..., EmbeddingStore]) -> None:
    store = new_store()
    compute(store, embeddings(), shards=[1])
    array = zarr.open_group(store.path, mode="r")["embeddings"][:]
    present = ~np.isnan(array).all(axis=(1, 2, 3))
    assert present.tolist() == [False] * 3 + [True] * 3 + [False] * 2


def test_chunks_start_at_multiples_of_4096_in_a_flat_folder(store: EmbeddingStore) -> None:
    layout = store.spec.layouts[0]
    names = {path.name for path in (store.path / "embeddings").iterdir()}
    assert names == {"zarr.json", "mobilesam", "c.0.0.0.0", "c.1.0.0.0", "c.2.0.0.0"}
    tail = (store.path / "embeddings" / "c.0.0.0.0").read_bytes()[-layout.index_bytes :]
    assert [int(offset) % ALIGNMENT for offset, _ in layout.decode_index(tail)] == [0, 0, 0]


def test_the_documents_say_what_the_format_promises(store: EmbeddingStore) -> None:
    group = json.loads((store.path / "zarr.json").read_text())
    array = json.loads((store.path / "embeddings" / "zarr.json").read_text())
    assert group["attributes"]["mobilesam"]["format"] == 1
    assert group["attributes"]["mobilesam"]["checkpoint_sha256"] == "ab" * 32
    assert group["consolidated_metadata"]["metadata"]["embeddings"] == array
    assert array["dimension_names"] == ["row", "channel", "y", "x"]
    assert array["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
    sharding = array["codecs"][0]
    assert sharding["name"] == "sharding_indexed"
    assert sharding["configuration"]["chunk_shape"] == [1, 256, 4, 4]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "crc32c"]
    assert array["fill_value"] == (0 if store.spec.dtype == "int8" else "NaN")


def test_an_extended_store_shows_its_new_length_to_every_reader(
    new_store: Callable[..., EmbeddingStore],
) -> None:

    store = new_store()
    store.extend(images(11)[8:], EVERYTHING)
    assert zarr.open_group(store.path, mode="r")["embeddings"].shape[0] == 11
    assert xarray.open_zarr(store.path).sizes["row"] == 11


@pytest.mark.parametrize("make", ["nothing", "folder", "file"])
def test_a_place_without_a_store_is_not_found(tmp_path: Path, make: str) -> None:
    place = tmp_path / "store.zarr"
    if make == "folder":
        place.mkdir()
    if make == "file":
        place.write_text("x")
    assert not exists(place)
    with pytest.raises(StoreNotFound, match="store"):
        EmbeddingStore.open(place)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"attributes": {"mobilesam": 1}}'])
def test_a_damaged_group_document_is_an_error(full_store: EmbeddingStore, content: bytes) -> None:
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
        StoreDamaged, match=r"with a manifest, .*: restore it with mobilesam inspect STORE --repair"
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
def test_a_changed_attribute_is_damage(full_store: EmbeddingStore, name: str, value: object) -> None:
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
