"""Where a store may be made, and what must never be touched there."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_store import EVERYTHING, HEAD, compute, embeddings, images, make_spec

from mobilesam.store import (
    EmbeddingStore,
    StoreError,
    refuse_taken,
)
from mobilesam.store.layout import PRIVATE
from mobilesam.store.store import draft_of


def _create(path: Path) -> EmbeddingStore:
    return EmbeddingStore.create(path, make_spec(), images(), EVERYTHING, HEAD)


def _create(path: Path) -> EmbeddingStore:
    return EmbeddingStore.create(path, make_spec(), images(), EVERYTHING, HEAD)


@pytest.mark.parametrize(
    "name", ["store.zarr.old.partial", "store.zarr.deadbeef.partial", "store.zarr.x.partial"]
)
def test_folders_of_other_people_that_look_like_a_draft_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("data")
    _create(tmp_path / "store.zarr").close()
    assert (tmp_path / name / "precious").read_text() == "data"


def test_a_name_with_wildcards_removes_no_draft_of_another_store(tmp_path: Path) -> None:
    other = tmp_path / "ab.deadbeef.partial"
    (other / "embeddings" / "mobilesam").mkdir(parents=True)
    _create(tmp_path / "a*").close()
    assert other.exists()


@pytest.mark.parametrize("path", [".", "/", ".."])
def test_a_place_without_a_name_is_refused_with_an_example(path: str) -> None:
    with pytest.raises(
        StoreError, match=r"can't become a store: name a folder of its own, as in .*store\.zarr"
    ):
        refuse_taken(Path(path))


def test_a_link_to_an_empty_folder_stays_a_link_and_the_store_is_made_behind_it(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    link = tmp_path / "store.zarr"
    link.symlink_to(disk)
    with _create(link) as store:
        compute(store, embeddings())
    assert link.is_symlink()
    assert (disk / "zarr.json").exists()
    with EmbeddingStore.open(link) as store:
        assert store.manifest.counts().done == 8


def test_a_link_that_leads_nowhere_is_named_with_its_goal(tmp_path: Path) -> None:
    (tmp_path / "store.zarr").symlink_to(tmp_path / "unmounted")
    with pytest.raises(StoreError, match=r"is a link to .*unmounted, which does not exist"):
        _create(tmp_path / "store.zarr")


def test_the_later_of_two_processes_that_make_the_same_store_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "store.zarr"
    with pytest.raises(StoreError, match="holds a store already"), draft_of(place):
        _create(place).close()
    with EmbeddingStore.open(place) as store:
        assert store.manifest.counts().pending == 8
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr"]


@pytest.mark.parametrize("made", ["", "embeddings"])
def test_a_draft_killed_before_all_its_folders_were_made_is_removed(tmp_path: Path, made: str) -> None:
    (tmp_path / "store.zarr.deadbeef.partial" / made).mkdir(parents=True)
    _create(tmp_path / "store.zarr").close()
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr"]


def test_an_abandoned_draft_is_removed_and_a_live_one_is_kept(tmp_path: Path) -> None:
    abandoned = tmp_path / "store.zarr.deadbeef.partial"
    (abandoned / PRIVATE).mkdir(parents=True)
    live = _create(tmp_path / "store.zarr.00000000.partial")
    with _create(tmp_path / "store.zarr"):
        assert not abandoned.exists()
        assert live.path.exists()
    live.close()


def test_create_leaves_no_draft_behind(tmp_path: Path) -> None:
    _create(tmp_path / "store.zarr").close()
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_in_the_way_is_neither_overwritten_nor_mixed_with(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "store.zarr"
    if kind == "folder":
        place.mkdir()
        (place / "precious").write_text("data")
    else:
        place.write_text("data")
    with pytest.raises(StoreError, match="exists and is no mobilesam store"):
        _create(place)
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr"]


def test_an_empty_folder_becomes_the_store(tmp_path: Path) -> None:
    (tmp_path / "store.zarr").mkdir()
    with _create(tmp_path / "store.zarr") as store:
        assert store.manifest.counts().pending == 8
