"""Images kept in a store: written with their embeddings, read back, and every damage to them found."""

from __future__ import annotations

import os
import sqlite3
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import zarr
from small_store import compute, embeddings, images, picture
from store_damage import found_problems

from mobilesam.store import EmbeddingStore, Selection, StoreDamaged, StoreError, StoreMismatch
from mobilesam.store.inspection import inspect_store, inspection_lines
from mobilesam.store.kept_images import FOLDER
from mobilesam.store.layout import MANIFEST

NewStore = Callable[..., EmbeddingStore]
FAILED = 4


@pytest.fixture
def store(new_store: NewStore) -> EmbeddingStore:
    """A store that keeps images, row 4 failed, open for writing."""
    store = new_store(kept_images="webp")
    compute(store, embeddings(), failed=[FAILED])
    return store


def _tar(store: EmbeddingStore, shard: int) -> Path:
    return store.path / FOLDER / f"{shard}.tar"


def test_every_image_comes_back_as_it_was_kept(store: EmbeddingStore) -> None:
    for row in set(range(8)) - {FAILED}:
        assert store.read_image(row) == picture(row)
    with pytest.raises(StoreError, match=r"row 4 of .* is not done"):
        store.read_image(FAILED)


def test_any_tar_program_finds_them_by_row(store: EmbeddingStore) -> None:
    found = {}
    for shard in range(3):
        with tarfile.open(_tar(store, shard)) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    assert found == {f"{row:012d}.webp": picture(row) for row in range(8) if row != FAILED}


def test_zarr_readers_see_nothing_of_them(store: EmbeddingStore, recwarn: pytest.WarningsRecorder) -> None:
    group = zarr.open_group(store.path, mode="r")
    assert [name for name, _ in group.members()] == ["embeddings"]
    assert not list(recwarn)


def test_a_store_that_keeps_none_has_none(full_store: EmbeddingStore) -> None:
    assert not (full_store.path / FOLDER).exists()
    assert all(record.kept is None for record in full_store.manifest.records())
    with pytest.raises(ValueError, match="keeps no images"):
        full_store.read_image(0)


def test_inspect_tells_of_them_and_counts_their_bytes(store: EmbeddingStore) -> None:
    store.close()
    result = inspect_store(store.path, check=True)
    assert result["kept_images"] == "webp"
    assert result["bytes"] == sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    assert result["problems"] == []
    assert any("kept images   webp" in line for line in inspection_lines(result))


@pytest.mark.parametrize(
    ("place", "kind", "row"),
    [(5, "checksum", 3), (512 + 7, "checksum", 3), (-1, "checksum", None), (-1025, "checksum", 5)],
    ids=["a member's name", "a member's bytes", "the end", "what fills up the last member"],
)
def test_every_flipped_bit_is_found(store: EmbeddingStore, place: int, kind: str, row: int | None) -> None:
    path = _tar(store, 1)
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    store.close()
    assert found_problems(store) == [(kind, 1, row)]


def test_a_flipped_bit_of_an_image_is_never_read_as_data(store: EmbeddingStore) -> None:
    path = _tar(store, 1)
    data = bytearray(path.read_bytes())
    data[512 + 7] ^= 4
    path.write_bytes(data)
    with pytest.raises(StoreDamaged, match=r"1\.tar, row 3 .* not the one that was committed.*--repair"):
        store.read_image(3)
    assert store.read_image(5) == picture(5)


def test_missing_cut_and_swapped_tars_are_found_and_mended(store: EmbeddingStore) -> None:
    _tar(store, 0).unlink()
    _tar(store, 1).write_bytes(_tar(store, 1).read_bytes()[:-600])
    with pytest.raises(StoreError, match=r"0\.tar"):
        store.read_image(0)
    store.close()
    assert found_problems(store) == [("missing", 0, None), ("short", 1, None)]
    whole = _tar(store, 2)
    before = whole.stat().st_ino, whole.read_bytes()
    assert inspect_store(store.path, repair=True)["repaired"]["withdrawn"] == [0, 1]
    with EmbeddingStore.open(store.path, writable=True) as again:
        compute(again, embeddings(), failed=[FAILED])
    assert found_problems(store) == []
    assert (whole.stat().st_ino, whole.read_bytes()) == before


@pytest.mark.parametrize("size", [0, 1, 1023])
def test_a_tar_shorter_than_its_end_is_found_though_its_listing_is_damaged_too(
    store: EmbeddingStore, size: int
) -> None:
    store.close()
    with closing(sqlite3.connect(store.path / MANIFEST)) as connection, connection:
        connection.execute("UPDATE results SET crc32c = coalesce(crc32c, 0) + 1 WHERE row < 3")
    os.truncate(_tar(store, 0), size)
    found = found_problems(store)
    assert ("short", 0, None) in found
    assert {(kind, shard) for kind, shard, _ in found} == {("listing", 0), ("short", 0)}


def test_a_tar_of_another_shard_is_damage(store: EmbeddingStore) -> None:
    first, second = _tar(store, 0).read_bytes(), _tar(store, 2).read_bytes()
    _tar(store, 0).write_bytes(second)
    with pytest.raises(StoreDamaged, match="row 1"):
        store.read_image(1)
    _tar(store, 0).write_bytes(first)
    assert store.read_image(1) == picture(1)


def test_an_extension_keeps_its_images_too(store: EmbeddingStore) -> None:
    store.extend(images(10)[8:], Selection(fraction=1.0, seed=0, limit=None))
    compute(store, embeddings(10), failed=[FAILED])
    assert [store.read_image(row) for row in (7, 8, 9)] == [picture(row) for row in (7, 8, 9)]


def test_what_a_killed_attempt_left_is_removed(store: EmbeddingStore) -> None:
    leftover = store.path / FOLDER / "1.tar.abc.partial"
    unlisted = store.path / FOLDER / "9.tar"
    other = store.path / FOLDER / "notes.txt"
    for path in (leftover, unlisted, other):
        path.write_bytes(b"x")
    store.close()
    assert not leftover.exists(), "the writer takes its own away when it closes"
    assert found_problems(store) == [("orphan", 9, None)]
    inspect_store(store.path, repair=True)
    assert (unlisted.exists(), other.exists()) == (False, True)


def test_keeping_images_is_part_of_what_a_store_is(full_store: EmbeddingStore) -> None:
    full_store.spec.refuse_differences(full_store.path, {"kept_images": None})
    with pytest.raises(StoreMismatch, match="kept_images: store None, asked 'webp'"):
        full_store.spec.refuse_differences(full_store.path, {"kept_images": "webp"})
