"""Damage to a store's files: never read as data, found by the check, repaired by repair and a rerun.

Rows are random here, written as worker and coordinator do; `test_store_repair.py` uses the commands.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import google_crc32c
import pytest
from faults.damage.corruption import bits, byte_classes, cut, flip, lengths, swap, zero
from faults.damage.damaged_stores import DamagedStores, named, repair_store, shard
from faults.fault_log import FaultLog
from faults.recovery import missing_rows, wrong_reads
from small_store import HEAD, compute, embeddings, make_spec

from mobilesam.store import EmbeddingStore, StoreError
from mobilesam.store.inspection import inspect_store
from mobilesam.store.layout import HEAD as HEAD_FILE
from mobilesam.store.layout import MANIFEST, PRIVATE

pytestmark = pytest.mark.fault

DTYPES = ("float16", "float32", "int8")
ARRAYS = [(dtype, "embeddings") for dtype in DTYPES] + [("int8", "scales")]
BYTE_CLASSES = ("payload", "checksum", "padding", "index entries", "index checksum")


@pytest.fixture
def damaged_stores(tmp_path: Path, fault_log: FaultLog) -> DamagedStores:
    return DamagedStores(tmp_path, fault_log)


# ---- flipped bits


@pytest.mark.parametrize("byte_class", BYTE_CLASSES)
@pytest.mark.parametrize(("dtype", "array"), ARRAYS)
def test_a_flipped_bit_of_a_shard_is_found_and_repaired(
    damaged_stores: DamagedStores, many: Callable[[int, int], int], dtype: str, array: str, byte_class: str
) -> None:
    layout = make_spec(dtype=dtype).layouts[0 if array == "embeddings" else 1]
    for number, slots in ((1, 3), (2, 2)):
        offsets = byte_classes(layout, slots)[byte_class]
        for offset, bit in bits(offsets, many(12, 2), f"{dtype}{array}{byte_class}{number}"):
            problems = damaged_stores.damage_and_repair(
                lambda path, at=(number, offset, bit): flip(shard(path, at[0], array), *at[1:]),
                call="flip", phase=f"{array} {byte_class}", file=array, ordinal=8 * offset + bit, dtype=dtype,
            )  # fmt: skip
            # The padding between rows is never read, so a flip there is no damage.
            assert named(problems, number, array) or byte_class == "padding", (offset, bit)


@pytest.mark.parametrize("document", ["zarr.json", "embeddings/zarr.json", "scales/zarr.json"])
def test_a_flipped_bit_of_a_zarr_document_is_found_and_repaired(
    damaged_stores: DamagedStores, many: Callable[[int, int], int], document: str
) -> None:
    size = (damaged_stores.intact("int8") / document).stat().st_size
    for offset, bit in bits(range(size), many(40, 4), document):
        problems = damaged_stores.damage_and_repair(
            lambda path, at=(offset, bit): flip(path / document, *at),
            call="flip", phase=document, file=document, ordinal=8 * offset + bit, dtype="int8",
        )  # fmt: skip
        assert problems, (offset, bit)


@pytest.mark.parametrize("part", ["header", "pages"])
def test_a_flipped_bit_of_the_manifest_is_never_read_as_data(
    damaged_stores: DamagedStores, many: Callable[[int, int], int], part: str
) -> None:
    size = (damaged_stores.intact() / MANIFEST).stat().st_size
    offsets = range(100) if part == "header" else used_bytes(damaged_stores.intact() / MANIFEST)
    assert size > 4096
    for offset, bit in bits(offsets, many(120, 6), part):
        damaged_stores.damage_and_repair(
            lambda path, at=(offset, bit): flip(path / MANIFEST, *at),
            call="flip", phase=f"manifest {part}", file=str(MANIFEST), ordinal=8 * offset + bit,
        )  # fmt: skip


def used_bytes(path: Path) -> list[int]:
    """Return offsets of nonzero bytes past the header: most of a small manifest's pages are empty."""
    return [offset for offset, byte in enumerate(path.read_bytes()) if offset >= 100 and byte]


def test_a_flipped_bit_of_the_head_is_found_and_repaired(
    damaged_stores: DamagedStores, many: Callable[[int, int], int]
) -> None:
    for offset, bit in bits(range(len(HEAD)), many(20, 3), "head"):
        problems = damaged_stores.damage_and_repair(
            lambda path, at=(offset, bit): flip(path / HEAD_FILE, *at),
            call="flip", phase="head", file=str(HEAD_FILE), ordinal=8 * offset + bit,
        )  # fmt: skip
        assert [problem["kind"] for problem in problems] == ["head"]


# ---- truncated, overwritten and missing files


@pytest.mark.parametrize(("dtype", "array"), ARRAYS)
def test_a_shard_of_another_length_is_found_and_repaired(
    damaged_stores: DamagedStores, many: Callable[[int, int], int], dtype: str, array: str
) -> None:
    layout = make_spec(dtype=dtype).layouts[0 if array == "embeddings" else 1]
    sizes = lengths(layout.file_bytes(3), layout.stride, many(10, 0), dtype + array)
    for length in sizes[:: many(1, 3)]:
        problems = damaged_stores.damage_and_repair(
            lambda path, length=length: cut(shard(path, 0, array), length),
            call="truncate", phase=f"{array} shard", file=array, ordinal=length, dtype=dtype,
        )  # fmt: skip
        assert named(problems, 0, array), length


@pytest.mark.parametrize(
    "file", ["zarr.json", "embeddings/zarr.json", str(MANIFEST), str(HEAD_FILE), str(PRIVATE / "writer.lock")]
)
def test_other_files_of_another_length_are_found_and_repaired(
    damaged_stores: DamagedStores, many: Callable[[int, int], int], file: str
) -> None:
    size = (damaged_stores.intact() / file).stat().st_size
    for length in lengths(size, 4096, many(6, 0), file) if size else [1, 4096]:
        problems = damaged_stores.damage_and_repair(
            lambda path, length=length: cut(path / file, max(length, 0)),
            call="truncate", phase=file, file=file, ordinal=length,
        )  # fmt: skip
        # SQLite reads a truncated last page as zeros, which is an empty page.
        harmless = length > size or "lock" in file or (file == str(MANIFEST) and length > size - 4096)
        assert problems or harmless, length


@pytest.mark.parametrize("action", ["delete", "zeros", "nested"])
@pytest.mark.parametrize(
    "file",
    ["embeddings/c.0.0.0.0", "embeddings/c.2.0.0.0", "scales/c.1.0", "zarr.json", "embeddings/zarr.json",
     "scales/zarr.json", str(MANIFEST), str(HEAD_FILE)],
)  # fmt: skip
def test_a_file_deleted_or_overwritten_is_found_and_repaired(
    damaged_stores: DamagedStores, file: str, action: str
) -> None:
    """Overwrites with zeros, or with JSON nested too deep for a parser."""

    def damage(path: Path) -> None:
        if action == "zeros":
            zero(path / file)
        elif action == "nested":
            (path / file).write_bytes(b"[" * 200_000)
        else:
            (path / file).unlink()

    kind = "shard" if "c." in file else file
    assert damaged_stores.damage_and_repair(damage, call=action, phase=kind, file=file, dtype="int8")


@pytest.mark.parametrize(
    "file", ["embeddings/c.0.0.0.0", "scales/c.1.0", "zarr.json", "embeddings/zarr.json", str(HEAD_FILE)]
)
def test_a_folder_in_place_of_a_file_is_never_deleted(
    damaged_stores: DamagedStores, fault_log: FaultLog, file: str
) -> None:
    path, undisturbed = damaged_stores.copy("int8")
    (path / file).unlink()
    (path / file).mkdir()
    (path / file / "precious").write_text("mine")
    wrong = wrong_reads(path, undisturbed)
    with pytest.raises(StoreError, match=re.escape(f"{path / file}: Is a directory")):
        inspect_store(path, repair=True)
    assert (path / file / "precious").read_text() == "mine"
    shutil.rmtree(path / file)
    repair_store(path, "int8")
    lost = missing_rows(path, undisturbed)
    fault_log.record(
        call="folder",
        ordinal=0,
        file=file,
        phase="folder in its place",
        fired=True,
        lost=len(lost),
        wrong=len(wrong),
    )
    assert (wrong, lost) == ([], [])


def test_a_store_with_everything_deleted_but_the_manifest_is_repaired(damaged_stores: DamagedStores) -> None:
    def damage(path: Path) -> None:
        manifest = (path / MANIFEST).read_bytes()
        shutil.rmtree(path)
        (path / PRIVATE).mkdir(parents=True)
        (path / MANIFEST).write_bytes(manifest)

    for dtype in DTYPES:
        assert damaged_stores.damage_and_repair(
            damage, call="delete", phase="all but the manifest", file="*", dtype=dtype
        )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"host": 7}',
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"pid": "x", "host": null}',
    ],
)
def test_any_content_of_the_owners_file_is_harmless(damaged_stores: DamagedStores, content: bytes) -> None:
    """No live process holds the lock, so the owner's file does not matter."""
    damaged_stores.damage_and_repair(
        lambda path: (path / PRIVATE / "writer.json").write_bytes(content),
        call="overwrite", phase="writer.json", file=str(PRIVATE / "writer.json"), ordinal=len(content),
    )  # fmt: skip


# ---- files and rows in the wrong place


@pytest.mark.parametrize(("dtype", "array"), ARRAYS)
def test_two_swapped_shards_are_found_and_repaired(
    damaged_stores: DamagedStores, dtype: str, array: str
) -> None:
    problems = damaged_stores.damage_and_repair(
        lambda path: swap(shard(path, 0, array), shard(path, 1, array)),
        call="swap", phase=f"{array} shards", file=array, dtype=dtype,
    )  # fmt: skip
    assert named(problems, 0, array)
    assert named(problems, 1, array)
    assert not named(problems, 2, array)


@pytest.mark.parametrize(("dtype", "array"), ARRAYS)
@pytest.mark.parametrize("way", ["rows", "index entries"])
def test_two_rows_swapped_with_their_checksums_are_found_and_repaired(
    damaged_stores: DamagedStores, dtype: str, array: str, way: str
) -> None:
    layout = make_spec(dtype=dtype).layouts[0 if array == "embeddings" else 1]

    def damage(path: Path) -> None:
        file = shard(path, 0, array)
        data = bytearray(file.read_bytes())
        if way == "rows":
            first, second = (data[n * layout.stride : (n + 1) * layout.stride] for n in (0, 1))
            data[: 2 * layout.stride] = second + first
        else:
            # The index is rewritten with a right checksum of its own.
            body = data[3 * layout.stride : -4]
            body[:16], body[16:32] = body[16:32], body[:16]
            data[3 * layout.stride :] = body + google_crc32c.value(bytes(body)).to_bytes(4, "little")
        file.write_bytes(data)

    problems = damaged_stores.damage_and_repair(
        damage, call="swap", phase=f"{array} {way}", file=array, dtype=dtype
    )
    kind = "identity" if way == "rows" else "listing"
    assert {(problem["kind"], problem["row"]) for problem in problems} == {(kind, 0), (kind, 1)}
    assert {problem["key"] for problem in problems} == {"photo0000.jpg", "photo0001.jpg"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shard_of_another_store_is_found_and_repaired(damaged_stores: DamagedStores, dtype: str) -> None:
    other = damaged_stores.intact(dtype, seed=1)
    problems = damaged_stores.damage_and_repair(
        lambda path: shutil.copy(shard(other, 2), shard(path, 2)),
        call="copy", phase="another store's shard", file="embeddings", dtype=dtype,
    )  # fmt: skip
    assert {(problem["kind"], problem["row"]) for problem in problems} == {("identity", 6), ("identity", 7)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shard_of_another_dtypes_store_is_found_and_repaired(
    damaged_stores: DamagedStores, dtype: str
) -> None:
    other = damaged_stores.intact("float32" if dtype == "float16" else "float16")
    problems = damaged_stores.damage_and_repair(
        lambda path: shutil.copy(shard(other, 0), shard(path, 0)),
        call="copy", phase="another dtype's shard", file="embeddings", dtype=dtype,
    )  # fmt: skip
    assert named(problems, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shard_of_an_older_commit_is_found_and_repaired(damaged_stores: DamagedStores, dtype: str) -> None:
    """The shard was withdrawn and recomputed with other values; then the older file is put back."""
    stale = damaged_stores.intact(dtype, seed=2)

    def damage(path: Path) -> None:
        recommitted = shard(path, 0).read_bytes()
        with EmbeddingStore.open(path, writable=True) as store:
            store.withdraw([0])
            compute(store, embeddings())
        assert shard(path, 0).read_bytes() == recommitted
        shutil.copy(shard(stale, 0), shard(path, 0))

    problems = damaged_stores.damage_and_repair(
        damage, call="copy", phase="an older commit's shard", file="embeddings", dtype=dtype
    )
    assert {problem["row"] for problem in problems} == {0, 1, 2}


def test_scales_of_another_store_are_found_and_repaired(damaged_stores: DamagedStores) -> None:
    other = damaged_stores.intact("int8", seed=1)
    problems = damaged_stores.damage_and_repair(
        lambda path: shutil.copy(shard(other, 0, "scales"), shard(path, 0, "scales")),
        call="copy", phase="another store's scales", file="scales", dtype="int8",
    )  # fmt: skip
    assert named(problems, 0, "scales")


def test_another_stores_zarr_json_is_found_and_repaired(damaged_stores: DamagedStores) -> None:
    for dtype, other in (
        ("float16", damaged_stores.intact("float16", seed=1)),
        ("float16", damaged_stores.intact("int8")),
    ):
        assert damaged_stores.damage_and_repair(
            lambda path, other=other: shutil.copy(other / "zarr.json", path / "zarr.json"),
            call="copy", phase="another store's zarr.json", file="zarr.json", dtype=dtype,
        )  # fmt: skip


def test_another_stores_manifest_is_found_and_repaired(damaged_stores: DamagedStores) -> None:
    other = damaged_stores.intact("float16", seed=1)
    problems = damaged_stores.damage_and_repair(
        lambda path: shutil.copy(other / MANIFEST, path / MANIFEST),
        call="copy", phase="another store's manifest", file=str(MANIFEST),
    )  # fmt: skip
    assert problems


# ---- an older manifest


@pytest.mark.parametrize("moment", ["empty", "first shard", "other teacher"])
def test_an_older_manifest_is_found_and_repaired(damaged_stores: DamagedStores, moment: str) -> None:
    """Rows that the older manifest lists with the present bytes are read; the others are pending, or an error."""

    def damage(path: Path) -> None:
        with EmbeddingStore.open(path, writable=True) as store:
            store.withdraw([0, 1, 2] if moment != "first shard" else [1, 2])
            if moment == "other teacher":
                compute(store, embeddings(seed=3))
        older = (path / MANIFEST).read_bytes()
        with EmbeddingStore.open(path, writable=True) as store:
            store.withdraw([0, 1, 2])
            compute(store, embeddings())
        (path / MANIFEST).write_bytes(older)

    problems = damaged_stores.damage_and_repair(
        damage, call="copy", phase=f"older manifest, {moment}", file=str(MANIFEST)
    )
    assert named(problems, 1)


def test_a_stale_hot_journal_causes_no_wrong_read(damaged_stores: DamagedStores) -> None:
    """SQLite rolls a journal back into the manifest beside it, even one of another time."""

    def damage(path: Path) -> None:
        with EmbeddingStore.open(path, writable=True) as store:
            store.withdraw([0, 1])
        stale = hot_journal(path / MANIFEST)
        with EmbeddingStore.open(path, writable=True) as store:
            compute(store, embeddings())
        (path / f"{MANIFEST}-journal").write_bytes(stale)

    damaged_stores.damage_and_repair(damage, call="copy", phase="stale journal", file=f"{MANIFEST}-journal")


@pytest.mark.parametrize("length", [1, 512, 5000])
def test_a_journal_of_garbage_is_harmless(damaged_stores: DamagedStores, length: int) -> None:
    """An empty journal is SQLite's own, which stays until the next transaction."""
    damaged_stores.damage_and_repair(
        lambda path: (path / f"{MANIFEST}-journal").write_bytes(b"\x5a" * length),
        call="overwrite", phase="journal", file=f"{MANIFEST}-journal", ordinal=length,
    )  # fmt: skip


def hot_journal(manifest: Path) -> bytes:
    """Return the journal that a writer killed in a large transaction leaves.

    It is read during a transaction, which is then rolled back.
    """
    with closing(sqlite3.connect(manifest, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE images SET key = key || zeroblob(2000)")
        connection.execute("DELETE FROM results")
        data = Path(f"{manifest}-journal").read_bytes()
        connection.execute("ROLLBACK")
    assert data.startswith(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7")
    return data
