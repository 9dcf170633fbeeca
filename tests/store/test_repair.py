"""Repair withdraws what is damaged, and nothing else; recomputing it gives the store as it was."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from small_store import HEAD, compute, embeddings, images
from store_damage import flip_byte, run_sql, shard_file

from mobilesam.store import Audit, EmbeddingStore, Selection, StoreDamaged, StoreError, StoreLocked
from mobilesam.store.inspection import inspect_store, inspection_lines
from mobilesam.store.layout import HEAD as HEAD_FILE
from mobilesam.store.layout import MANIFEST

NewStore = Callable[..., EmbeddingStore]


@pytest.fixture
def store(new_store: NewStore) -> EmbeddingStore:
    """An int8 store (two arrays) in five shards, closed."""
    store = new_store(dtype="int8", rows=15)
    compute(store, embeddings(15))
    store.close()
    return store


def _state(store: EmbeddingStore) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time of the last change and bytes of every shard file."""
    return {
        str(path.relative_to(store.path)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(store.path.glob("*/c.*"))
    }


def _damage(store: EmbeddingStore) -> None:
    """Shard 1 flipped, the scales of shard 2 lost, the listing of shard 3 changed, and some leftovers."""
    flip_byte(shard_file(store, 1), 5)
    shard_file(store, 2, 1).unlink()
    run_sql(store, "UPDATE results SET width = 1 WHERE row = 10")
    (store.path / "embeddings" / "c.4.0.0.0.dead.partial").write_bytes(b"x")
    (store.path / "embeddings" / "c.9.0.0.0").write_bytes(b"x")


def _assert_whole(store: EmbeddingStore) -> None:
    assert inspect_store(store.path, check=True)["problems"] == []
    with EmbeddingStore.open(store.path) as reader:
        assert reader.manifest.counts().pending == 0
        reader.read(range(15))
    assert {name: data for name, (_, _, data) in _state(store).items()} == store.whole


@pytest.fixture
def damaged(store: EmbeddingStore) -> EmbeddingStore:
    store.whole = {name: data for name, (_, _, data) in _state(store).items()}
    _damage(store)
    return store


def _recompute(store: EmbeddingStore) -> None:
    with EmbeddingStore.open(store.path, writable=True) as writer:
        compute(writer, embeddings(15))


def test_damaged_shards_are_taken_out_and_good_ones_are_not_touched(damaged: EmbeddingStore) -> None:
    before = _state(damaged)
    result = inspect_store(damaged.path, repair=True)
    assert result["problems"] == []
    assert result["repaired"]["withdrawn"] == [1, 2, 3]
    assert sorted(result["repaired"]["removed"]) == [
        "embeddings/c.1.0.0.0", "embeddings/c.2.0.0.0", "embeddings/c.3.0.0.0", "embeddings/c.4.0.0.0.dead.partial",
        "embeddings/c.9.0.0.0", "scales/c.1.0", "scales/c.3.0",
    ]  # fmt: skip
    kinds = sorted(problem["kind"] for problem in result["repaired"]["problems"])
    assert kinds == ["checksum", "listing", "missing", "orphan", "orphan"]
    assert result["rows"] == {"done": 6, "pending": 9, "failed": 0}
    good = ["embeddings/c.0.0.0.0", "embeddings/c.4.0.0.0", "scales/c.0.0", "scales/c.4.0"]
    assert {name: before[name] for name in good} == _state(damaged)
    _recompute(damaged)
    _assert_whole(damaged)


def test_a_repair_of_a_whole_store_changes_nothing(store: EmbeddingStore) -> None:
    before = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}
    result = inspect_store(store.path, repair=True)
    assert result["repaired"] == {"withdrawn": [], "removed": [], "rewritten": [], "problems": []}
    assert result["command"] is None
    assert before == {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}


def test_a_second_repair_finds_nothing(damaged: EmbeddingStore) -> None:
    first = inspect_store(damaged.path, repair=True)
    second = inspect_store(damaged.path, repair=True)
    assert second["repaired"] == {"withdrawn": [], "removed": [], "rewritten": [], "problems": []}
    assert second["rows"] == first["rows"]
    assert second["command"] == first["command"] is not None


def test_a_repair_that_is_cut_short_anywhere_is_finished_by_the_next(
    damaged: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilesam.store.manifest import ManifestWriter

    real_unlink, real_withdraw = Path.unlink, ManifestWriter.withdraw_shard
    steps = 0

    class Killed(BaseException):
        pass

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            if str(arguments[0]).endswith("writer.json"):
                return real(*arguments, **options)
            if steps == 0:
                raise Killed
            steps -= 1
            return real(*arguments, **options)

        return step

    monkeypatch.setattr(Path, "unlink", counted(real_unlink))
    monkeypatch.setattr(ManifestWriter, "withdraw_shard", counted(real_withdraw))
    for allowed in range(12):
        steps = allowed
        try:
            inspect_store(damaged.path, repair=True)
        except Killed:
            steps = 1000
            with EmbeddingStore.open(damaged.path) as reader:
                for row in range(15):
                    with suppress(StoreError):
                        error = np.abs(reader.read([row]).to_float32()[0] - embeddings(15)[row]).max()
                        assert error < 0.1
        else:
            break
    steps = 1000
    assert allowed > 1
    assert inspect_store(damaged.path, check=True)["problems"] == []
    _recompute(damaged)
    _assert_whole(damaged)


def test_repair_is_refused_while_somebody_writes(full_store: EmbeddingStore) -> None:
    with pytest.raises(StoreLocked, match=f"process {os.getpid()}"):
        inspect_store(full_store.path, repair=True)


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"attributes": {"mobilesam": {"format": 1}}}'])
def test_a_lost_group_document_is_restored_from_the_manifest_to_the_byte(
    store: EmbeddingStore, content: bytes | None
) -> None:
    document = store.path / "zarr.json"
    whole = document.read_bytes()
    document.unlink() if content is None else document.write_bytes(content)
    with pytest.raises(StoreDamaged, match="mobilesam inspect STORE --repair"):
        EmbeddingStore.open(store.path)
    result = inspect_store(store.path, repair=True)
    assert result["repaired"]["rewritten"] == ["zarr.json"]
    assert result["problems"] == []
    assert document.read_bytes() == whole


def test_a_changed_attribute_is_restored_too(store: EmbeddingStore) -> None:
    document = store.path / "zarr.json"
    whole = document.read_bytes()
    document.write_bytes(whole.replace(b'"/photos"', b'"/others"'))
    with pytest.raises(StoreDamaged, match=r"attributes .*--repair"):
        EmbeddingStore.open(store.path)
    inspect_store(store.path, repair=True)
    assert document.read_bytes() == whole


def test_a_lost_arrays_folder_comes_back(store: EmbeddingStore) -> None:
    for path in (store.path / "scales").iterdir():
        path.unlink()
    (store.path / "scales").rmdir()
    result = inspect_store(store.path, repair=True)
    assert result["repaired"]["withdrawn"] == [0, 1, 2, 3, 4]
    assert result["repaired"]["rewritten"] == ["scales/zarr.json"]
    _recompute(store)
    assert inspect_store(store.path, check=True)["problems"] == []
    assert zarr.open_group(store.path, mode="r")["scales"].shape == (15, 256)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE meta SET value = '{}' WHERE name = 'spec'",
        "UPDATE documents SET content = x'7b' WHERE name = 'zarr.json'",
        "DELETE FROM meta WHERE name = 'spec'",
    ],
)
def test_the_manifests_own_copies_are_restored_from_the_documents(
    store: EmbeddingStore, statement: str
) -> None:
    run_sql(store, statement)
    (problem,) = inspect_store(store.path)["problems"]
    assert (problem["kind"], problem["file"]) == ("metadata", str(store.path / MANIFEST))
    assert inspect_store(store.path, repair=True)["problems"] == []
    assert inspect_store(store.path, check=True)["problems"] == []
    (store.path / "zarr.json").unlink()
    assert inspect_store(store.path, repair=True)["problems"] == []
    EmbeddingStore.open(store.path).close()


@pytest.mark.parametrize(
    ("place", "bit"),
    [
        (8, 3),  # embeddinos/zarr.json: the bit that the fault suite found, 94467 of its manifest
        (8, 6),  # embeddin'/zarr.json
        (10, 0),  # one name, without a folder
        (-2, 0),  # embeddings/zarr.jsnn
    ],
)
def test_a_flipped_bit_in_a_documents_name_leaves_no_file_of_that_name(
    store: EmbeddingStore, place: int, bit: int
) -> None:
    manifest, name = store.path / MANIFEST, b"embeddings/zarr.json"
    data = bytearray(manifest.read_bytes())
    assert data.count(name) == 1
    data[data.index(name) + place % len(name)] ^= 1 << bit
    before = {path for path in store.path.rglob("*") if path.name != "writer.json"}
    manifest.write_bytes(data)
    with pytest.raises(StoreDamaged, match=r"copies of zarr\.json are not this store's .*--repair"):
        EmbeddingStore.open(store.path, writable=True)
    (problem,) = inspect_store(store.path)["problems"]
    assert (problem["kind"], problem["file"]) == ("metadata", str(manifest))
    assert inspect_store(store.path, repair=True)["problems"] == []
    assert {path for path in store.path.rglob("*") if path.name != "writer.json"} == before
    EmbeddingStore.open(store.path, writable=True).close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE documents SET name = '../' || name",
        "DELETE FROM documents WHERE name = 'scales/zarr.json'",
        "DELETE FROM documents",
    ],
)
def test_documents_under_other_names_are_replaced_by_the_stores_own(
    store: EmbeddingStore, statement: str
) -> None:
    run_sql(store, statement)
    (problem,) = inspect_store(store.path)["problems"]
    assert (problem["kind"], problem["file"]) == ("metadata", str(store.path / MANIFEST))
    assert inspect_store(store.path, repair=True)["problems"] == []
    assert inspect_store(store.path, check=True)["problems"] == []
    assert [path.name for path in store.path.parent.iterdir()] == [store.path.name]


def test_a_damaged_copy_of_a_document_is_never_written_over_a_whole_one(store: EmbeddingStore) -> None:
    run_sql(store, "UPDATE documents SET content = x'7b7d' WHERE name = 'embeddings/zarr.json'")
    document = store.path / "embeddings" / "zarr.json"
    whole = document.read_bytes()
    with pytest.raises(StoreDamaged, match="--repair"):
        EmbeddingStore.open(store.path, writable=True)
    assert document.read_bytes() == whole


def test_a_damaged_head_is_reported_and_left_to_precompute(store: EmbeddingStore) -> None:
    flip_byte(store.path / HEAD_FILE, 9)
    result = inspect_store(store.path, repair=True)
    assert [problem["kind"] for problem in result["problems"]] == ["head"]
    assert result["command"].startswith("mobilesam precompute")
    with EmbeddingStore.open(store.path, writable=True) as writer:
        writer.restore_head(HEAD)
    assert inspect_store(store.path)["problems"] == []


def test_an_audit_out_of_tolerance_stays_until_its_shard_is_withdrawn(store: EmbeddingStore) -> None:
    with EmbeddingStore.open(store.path, writable=True) as writer:
        writer.record_audits([Audit(row=4, cosine=0.1, relative_mse=2.0)])
    result = inspect_store(store.path, repair=True)
    assert [problem["kind"] for problem in result["problems"]] == ["audit"]
    assert result["repaired"]["withdrawn"] == []
    flip_byte(shard_file(store, 1), 0)
    assert inspect_store(store.path, repair=True)["problems"] == []


def test_results_without_a_shard_are_taken_out(store: EmbeddingStore) -> None:
    run_sql(store, "DELETE FROM shards WHERE shard = 2")
    assert {problem["shard"] for problem in inspect_store(store.path, check=True)["problems"]} == {2}
    result = inspect_store(store.path, repair=True)
    assert result["repaired"]["withdrawn"] == [2]
    _recompute(store)
    assert inspect_store(store.path, check=True)["problems"] == []


def test_a_listed_shard_that_no_row_belongs_to_is_taken_out(store: EmbeddingStore) -> None:
    run_sql(store, "UPDATE shards SET shard = 77 WHERE shard = 2")
    inspect_store(store.path, repair=True)
    with EmbeddingStore.open(store.path) as reader:
        assert list(reader.manifest.committed_shards()) == [0, 1, 3, 4]
    assert inspect_store(store.path, check=True)["problems"] == []


def test_damaged_indexes_of_the_manifest_are_rebuilt(store: EmbeddingStore) -> None:
    manifest = store.path / MANIFEST
    data = manifest.read_bytes()
    key = b"photo0003.jpg"
    places = [place for place in range(len(data)) if data.startswith(key, place)]
    assert len(places) == 2  # in the table, and in the index of keys
    mended = []
    for place in places:
        manifest.write_bytes(data[:place] + b"q" + data[place + 1 :])
        problems = inspect_store(store.path, check=True)["problems"]
        assert problems
        assert {(problem["kind"], problem["shard"]) for problem in problems} == {("listing", None)}
        left = inspect_store(store.path, repair=True)["problems"]
        mended.append(left == [])
        if left == []:
            with EmbeddingStore.open(store.path) as reader:
                assert list(reader.manifest.sorted_keys()) == [b"photo%04d.jpg" % row for row in range(15)]
    assert sorted(mended) == [False, True]


def test_damaged_pages_of_the_manifest_are_reported_and_nothing_is_written(store: EmbeddingStore) -> None:
    manifest = store.path / MANIFEST
    data = bytearray(manifest.read_bytes())
    with sqlite3.connect(manifest) as connection:
        page = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'audits'").fetchone()[0]
    connection.close()
    start = (page - 1) * 4096
    data[start : start + 4096] = b"\xff" * 4096
    manifest.write_bytes(data)
    with pytest.raises(StoreDamaged, match=r"manifest\.sqlite is damaged .*make the store again"):
        inspect_store(store.path)
    with pytest.raises(StoreDamaged, match=r"manifest\.sqlite is damaged"):
        inspect_store(store.path, repair=True)
    assert manifest.read_bytes() == data
    with EmbeddingStore.open(store.path) as reader:
        assert reader.read([3]).values.shape == (1, 256, 4, 4)


def test_the_lines_of_a_repair_say_what_was_done_and_what_to_do(damaged: EmbeddingStore) -> None:
    lines = inspection_lines(inspect_store(damaged.path, repair=True))
    assert "repair        3 shards withdrawn, 7 files removed, 0 rewritten" in lines
    assert lines[-3:] == [
        "check         whole",
        "Compute the removed shards again with",
        f"  mobilesam precompute --images /photos --out {damaged.path} --teacher vit_nano",
    ]
    assert any(
        line.startswith("mended        checksum: embeddings/c.1.0.0.0, shard 1, row 3, photo0003.jpg: ")
        for line in lines
    )


def test_an_extension_keeps_what_was_asked_last_for_the_command(store: EmbeddingStore) -> None:
    with EmbeddingStore.open(store.path, writable=True) as writer:
        more = Selection(fraction=0.5, seed=1, limit=None, sources=("/photos", "/more"))
        writer.extend(images(16)[15:], more)
    assert inspect_store(store.path)["command"] == (
        f"mobilesam precompute --images /photos /more --out {store.path} --teacher vit_nano --fraction 0.5 --seed 1"
    )
