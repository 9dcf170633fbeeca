"""What `inspect` says of a store, whole or damaged in every way that it knows."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_store import EVERYTHING, HEAD, compute, embeddings, images, make_spec

from mobilesam.store import (
    Audit,
    EmbeddingStore,
    ImageRef,
    RowResult,
    Selection,
    ShardWriter,
    StoreDamaged,
    StoreError,
    StoreNotFound,
    tolerance,
)
from mobilesam.store.check_shard import check_shard, shard_listing
from mobilesam.store.inspection import inspect_store, inspection_lines
from mobilesam.store.layout import HEAD as HEAD_FILE
from mobilesam.store.layout import MANIFEST, crc32c
from mobilesam.store.manifest import Manifest

NewStore = Callable[..., EmbeddingStore]


@pytest.fixture
def store(new_store: NewStore) -> EmbeddingStore:
    """An int8 store (two arrays), row 4 failed, closed."""
    store = new_store(dtype="int8")
    compute(store, embeddings(), failed=[4])
    store.close()
    return store


def _file(store: EmbeddingStore, shard: int, array: int = 0) -> Path:
    layout = store.spec.layouts[array]
    return store.path / layout.name / layout.file_name(shard)


def _flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def _found(store: EmbeddingStore) -> list[tuple[str, int | None, int | None]]:
    return [(p["kind"], p["shard"], p["row"]) for p in inspect_store(store.path, check=True)["problems"]]


def test_a_whole_store_is_described_and_whole(store: EmbeddingStore) -> None:
    result = inspect_store(store.path, check=True)
    files = [path for path in store.path.rglob("*") if path.is_file()]
    assert result["rows"] == {"done": 7, "pending": 0, "failed": 1}
    assert result["shards"] == {"committed": 3, "all": 3}
    assert result["bytes"] == sum(path.stat().st_size for path in files)
    assert (result["teacher"], result["dtype"], result["image_size"]) == ("vit_nano", "int8", 64)
    assert result["subset"] == {"fraction": 1.0, "seed": 0, "limit": None}
    assert result["checked"]
    assert result["problems"] == []
    assert result["audit"] is result["writer"] is result["repaired"] is result["command"] is None
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert inspection_lines(result)[-1] == "check         whole"


def test_checking_and_describing_change_nothing(store: EmbeddingStore) -> None:
    def state() -> dict[str, tuple[int, int, bytes]]:
        return {
            str(path): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
            for path in sorted(store.path.rglob("*"))
            if path.is_file()
        }

    _flip(_file(store, 0), 0)
    (store.path / "embeddings" / "c.9.0.0.0").write_bytes(b"x")
    before = state()
    inspect_store(store.path)
    inspect_store(store.path, check=True)
    assert state() == before


def test_a_missing_shard_is_one_problem(store: EmbeddingStore) -> None:
    _file(store, 1).unlink()
    (problem,) = inspect_store(store.path, check=True)["problems"]
    assert (problem["kind"], problem["shard"], problem["file"]) == ("missing", 1, str(_file(store, 1)))
    assert problem["message"] == "the file is missing, with 2 images"


@pytest.mark.parametrize("size", [0, 1, 4095, -1])
@pytest.mark.parametrize("array", [0, 1])
def test_a_file_of_another_length_is_short(store: EmbeddingStore, size: int, array: int) -> None:
    path = _file(store, 2, array)
    path.write_bytes(path.read_bytes()[:size] if size <= 0 else path.read_bytes() + b"x" * size)
    assert _found(store) == [("short", 2, None)]


def test_a_file_of_zero_bytes_is_told_as_such(store: EmbeddingStore) -> None:
    path = _file(store, 0, 1)
    path.write_bytes(bytes(path.stat().st_size))
    assert _found(store) == [("zeros", 0, None)]


def test_zero_bytes_in_a_rows_place_are_told_as_such(store: EmbeddingStore) -> None:
    path, layout = _file(store, 1), store.spec.layouts[0]
    data = bytearray(path.read_bytes())
    data[2 * layout.stride : 3 * layout.stride] = bytes(layout.stride)
    path.write_bytes(data)
    assert _found(store) == [("zeros", 1, 5)]


def test_an_embedding_of_zeros_is_no_damage(new_store: NewStore) -> None:
    store = new_store()
    compute(store, np.zeros_like(embeddings()))
    store.close()
    assert _found(store) == []


@pytest.mark.parametrize("array", [0, 1])
def test_a_flipped_bit_names_the_row_and_its_image(store: EmbeddingStore, array: int) -> None:
    layout = store.spec.layouts[array]
    _flip(_file(store, 2, array), layout.stride + layout.payload_bytes - 1)
    (problem,) = inspect_store(store.path, check=True)["problems"]
    assert (problem["kind"], problem["row"], problem["key"]) == ("checksum", 7, "photo0007.jpg")


def test_a_flipped_bit_in_the_checksum_behind_a_row_or_in_the_index_is_told(store: EmbeddingStore) -> None:
    layout = store.spec.layouts[0]
    _flip(_file(store, 0), layout.payload_bytes)
    _flip(_file(store, 2), -1)
    assert _found(store) == [("checksum", 0, 0), ("checksum", 2, None)]


def test_a_flipped_bit_in_padding_is_no_damage(store: EmbeddingStore) -> None:
    _flip(_file(store, 0), store.spec.layouts[0].payload_bytes + 4)
    assert _found(store) == []


def test_swapped_shards_name_whose_bytes_they_hold(new_store: NewStore) -> None:
    store = new_store()
    compute(store, embeddings())
    store.close()
    first, second, aside = _file(store, 0), _file(store, 1), store.path / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    problems = inspect_store(store.path, check=True)["problems"]
    assert [(p["kind"], p["row"]) for p in problems] == [("identity", row) for row in range(6)]
    assert [p["message"].rpartition(" row ")[2] for p in problems] == ["3", "4", "5", "0", "1", "2"]


def test_a_shard_of_another_store_is_foreign(new_store: NewStore) -> None:
    store, other = new_store("a.zarr"), new_store("b.zarr")
    compute(store, embeddings(seed=0))
    compute(other, embeddings(seed=1))
    shutil.copy(_file(other, 2), _file(store, 2))
    problems = inspect_store(store.path, check=True)["problems"]
    assert [(p["kind"], p["row"]) for p in problems] == [("identity", 6), ("identity", 7)]
    assert not any("they are those" in p["message"] for p in problems)


def test_a_stale_file_in_which_other_images_failed_contradicts_the_listing(new_store: NewStore) -> None:
    store = new_store()
    compute(store, embeddings(), failed=[4])
    stale = _file(store, 1).read_bytes()
    store.withdraw([1])
    compute(store, embeddings(), failed=[3])
    _file(store, 1).write_bytes(stale)
    store.close()
    assert _found(store) == [("listing", 1, 3), ("listing", 1, 4)]


def test_nan_and_infinity_are_told_though_every_checksum_is_right(new_store: NewStore) -> None:
    for number, (dtype, bad) in enumerate(
        [("float16", np.nan), ("float16", -np.inf), ("float32", np.inf), ("int8", np.nan)]
    ):
        store = new_store(f"{number}.zarr", dtype=dtype)
        _commit_value(store, bad)
        store.close()
        assert _found(store) == [("not-finite", 0, 1)], (dtype, bad)


def _commit_value(store: EmbeddingStore, bad: float) -> None:
    """Commit shard 0 as a writer without the test for finite values would."""
    results = []
    layouts = store.spec.layouts
    with ShardWriter(store.path, layouts, 0, "a", 3) as writer:
        for row in range(3):
            stored = writer.add(row, embeddings()[row])
            results.append(
                RowResult(row=row, sha256="00", crc32c=stored.crc32c, scales_crc32c=stored.scales_crc32c)
            )
        writer.finish()
    layout = layouts[-1]
    path = store.path / layout.name / f"{layout.file_name(0)}.a.partial"
    data = bytearray(path.read_bytes())
    values = np.frombuffer(data, layout.dtype, layout.payload_bytes // layout.dtype.itemsize, layout.stride)
    values[5] = bad
    checksum = crc32c(values)
    start = layout.stride + layout.payload_bytes
    data[start : start + 4] = checksum.to_bytes(4, "little")
    path.write_bytes(data)
    changed = {"scales_crc32c" if layout.name == "scales" else "crc32c": checksum}
    results[1] = replace(results[1], **changed)
    store.commit(0, "a", results)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE results SET crc32c = crc32c + 1 WHERE row = 3",
        "UPDATE results SET width = 41 WHERE row = 3",
        "UPDATE results SET sha256 = x'00' WHERE row = 3",
        "UPDATE results SET reason = 'no' WHERE row = 3",
        "UPDATE images SET size = 7 WHERE row = 3",
    ],
)
def test_a_changed_field_of_a_listed_row_names_the_row(store: EmbeddingStore, statement: str) -> None:
    _sql(store, statement)
    assert _found(store) == [("listing", 1, 3)]
    with EmbeddingStore.open(store.path) as reader, pytest.raises(StoreDamaged, match="row 3 is damaged"):
        reader.manifest.records(None)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE shards SET attempt = 'x' WHERE shard = 1",
        "UPDATE shards SET rows = 2 WHERE shard = 1",
        "UPDATE shards SET done = 3, failed = 0 WHERE shard = 1",
        "DELETE FROM results WHERE row = 3",
        "DELETE FROM shards WHERE shard = 1",
        "UPDATE shards SET rows = 'many' WHERE shard = 1",
    ],
)
def test_a_listing_that_contradicts_itself_is_told(store: EmbeddingStore, statement: str) -> None:
    _sql(store, statement)
    assert ("listing", 1, None) in _found(store)
    assert {shard for _, shard, _ in _found(store)} == {1}


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE images SET key = x'61' WHERE row = 2",
        "UPDATE images SET key = 'text' WHERE row = 2",
        "UPDATE extensions SET seed = 5",
        "UPDATE extensions SET sources = '[\"/other\"]'",
    ],
)
def test_a_changed_key_or_selection_is_past_mending(store: EmbeddingStore, statement: str) -> None:
    _sql(store, statement)
    for repair in (False, True):
        (problem,) = inspect_store(store.path, check=True, repair=repair)["problems"]
        assert (problem["kind"], problem["shard"]) == ("listing", None)
        assert "make the store again" in problem["message"]


def test_sources_that_are_no_json_are_damage(store: EmbeddingStore) -> None:
    _sql(store, "UPDATE extensions SET sources = '[]x'")
    with pytest.raises(StoreDamaged, match=r"manifest\.sqlite is damaged"):
        inspect_store(store.path)


def test_a_row_that_vanished_is_damage_at_once(store: EmbeddingStore) -> None:
    _sql(store, "DELETE FROM images WHERE row = 7")
    with pytest.raises(StoreDamaged, match="its last row is 6, but 8 were appended"):
        inspect_store(store.path)


def test_a_row_number_far_out_does_not_make_work_for_ever(store: EmbeddingStore) -> None:
    _sql(store, "UPDATE images SET row = 1125899906842624 WHERE row = 7")
    with EmbeddingStore.open(store.path) as reader, pytest.raises(StoreDamaged, match="damaged"):
        reader.pending_shards()


def _sql(store: EmbeddingStore, statement: str) -> None:
    import sqlite3

    with sqlite3.connect(store.path / MANIFEST) as connection:
        connection.execute(statement)
    connection.close()


def test_what_a_killed_writer_left_is_told_by_name(store: EmbeddingStore) -> None:
    left = ["embeddings/c.1.0.0.0.dead.partial", "scales/c.7.0", "zarr.json.00c0ffee.partial"]
    for name in left:
        (store.path / name).write_bytes(b"x")
    problems = inspect_store(store.path, check=True)["problems"]
    assert {p["kind"] for p in problems} == {"orphan"}
    assert sorted(p["file"] for p in problems) == sorted(str(store.path / name) for name in left)


def test_files_of_other_people_are_nobodys_problem(store: EmbeddingStore) -> None:
    for name in ["notes.txt", "embeddings/c.1.0.0.0.txt", "embeddings/c.01.0.0.0", "embeddings/c.9.0"]:
        (store.path / name).write_bytes(b"x")
    assert _found(store) == []


def test_a_live_writer_is_named_and_its_attempts_are_no_orphans(new_store: NewStore) -> None:
    store = new_store()
    compute(store, embeddings(), shards=[0])
    with ShardWriter(store.path, store.spec.layouts, 1, "live", 3):
        result = inspect_store(store.path, check=True)
    assert result["writer"]["pid"] == os.getpid()
    assert result["problems"] == []
    assert f"process {os.getpid()} on " in "\n".join(inspection_lines(result))


def test_looking_for_a_writer_does_not_keep_one_from_starting(store: EmbeddingStore) -> None:
    from mobilesam.store.layout import PRIVATE
    from mobilesam.store.lock import WriterLock

    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            WriterLock(store.path / PRIVATE).live_owner()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(20):
            EmbeddingStore.open(store.path, writable=True).close()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("name", ["zarr.json", "embeddings/zarr.json", "scales/zarr.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"attributes": {"mobilesam": {"format": 9}}}'])
def test_a_changed_document_is_told_even_without_a_check(
    store: EmbeddingStore, name: str, content: bytes | None
) -> None:
    (store.path / name).unlink() if content is None else (store.path / name).write_bytes(content)
    (problem,) = inspect_store(store.path)["problems"]
    assert (problem["kind"], problem["file"]) == ("metadata", str(store.path / name))


def test_a_changed_head_is_told_even_without_a_check(store: EmbeddingStore) -> None:
    _flip(store.path / HEAD_FILE, 20)
    result = inspect_store(store.path)
    assert [p["kind"] for p in result["problems"]] == ["head"]
    assert result["command"].startswith("mobilesam precompute --images /photos --out ")


def test_audits_are_summed_up_and_those_out_of_tolerance_are_problems(full_store: EmbeddingStore) -> None:
    limits = tolerance("float16", "float32")
    full_store.record_audits(
        [Audit(row=0, cosine=1.0, relative_mse=0.0), Audit(row=5, cosine=0.5, relative_mse=0.7)]
    )
    result = inspect_store(full_store.path)
    assert result["audit"] == {
        "rows": 2,
        "cosine_min": 0.5,
        "relative_mse_max": 0.7,
        "tolerance": {"cosine": limits.cosine, "relative_mse": limits.relative_mse},
    }
    (problem,) = result["problems"]
    assert (problem["kind"], problem["row"], problem["key"]) == ("audit", 5, "photo0005.jpg")
    full_store.record_audits([Audit(row=5, cosine=float("nan"), relative_mse=0.0)])
    result = inspect_store(full_store.path)
    assert result["audit"]["cosine_min"] is None
    assert [p["kind"] for p in result["problems"]] == ["audit"]
    json.dumps(result, allow_nan=False)


def test_no_store_a_foreign_manifest_and_a_lost_one_are_errors(new_store: NewStore, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound):
        inspect_store(tmp_path / "none.zarr")
    store, other = new_store("a.zarr"), new_store("b.zarr")
    shutil.copy(other.path / MANIFEST, store.path / MANIFEST)
    with pytest.raises(StoreDamaged, match="belongs to store"):
        inspect_store(store.path)
    (store.path / MANIFEST).unlink()
    with pytest.raises(StoreDamaged, match=r"manifest\.sqlite is missing"):
        inspect_store(store.path)


def test_a_manifest_of_an_earlier_version_says_so(store: EmbeddingStore) -> None:
    _sql(store, "PRAGMA user_version = 0")
    with pytest.raises(StoreError, match=r"made by an earlier version .* precompute again") as caught:
        EmbeddingStore.open(store.path)
    assert not isinstance(caught.value, StoreDamaged)
    _sql(store, "PRAGMA user_version = 9")
    with pytest.raises(StoreError, match="made by a later version"):
        inspect_store(store.path)


def test_a_flipped_bit_in_the_manifests_schema_is_damage(store: EmbeddingStore) -> None:
    manifest = store.path / MANIFEST
    data = manifest.read_bytes()
    place = data.index(b"INTEGER PRIMARY KEY, reason TEXT")
    manifest.write_bytes(data[:place] + b"iNTEGER" + data[place + 7 :])
    with pytest.raises(StoreDamaged, match="its tables are not as they were made"):
        EmbeddingStore.open(store.path)


def test_text_that_is_no_utf8_in_the_manifest_is_damage(store: EmbeddingStore) -> None:
    _sql(store, "UPDATE results SET reason = CAST(x'ff' AS TEXT) WHERE row = 4")
    with EmbeddingStore.open(store.path) as reader, pytest.raises(StoreDamaged, match="damaged"):
        reader.manifest.records("failed")
    assert _found(store) == [("listing", 1, None)]


def test_a_manifest_is_closed_when_no_thread_is_at_it_any_more(store: EmbeddingStore) -> None:
    manifest = Manifest(store.path / MANIFEST)
    held, closed = threading.Event(), threading.Event()

    def close() -> None:
        held.wait()
        manifest.close()
        closed.set()

    thread = threading.Thread(target=close)
    thread.start()
    with manifest.snapshot():
        held.set()
        assert not closed.wait(0.2)
        assert manifest.query("SELECT count(*) FROM images") == [(8,)]
    thread.join()
    assert closed.is_set()


def test_a_failing_disk_under_one_shard_is_that_shards_problem(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, real = _file(store, 1).stat().st_ino, os.preadv

    def failing(descriptor: int, *arguments: Any) -> int:
        if os.fstat(descriptor).st_ino == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, *arguments)

    monkeypatch.setattr(os, "preadv", failing)
    _flip(_file(store, 2), 0)
    assert _found(store) == [("unreadable", 1, None), ("checksum", 2, 6)]


def test_a_shard_that_may_not_be_read_is_an_error_rather_than_damage(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def denied(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("c.1.0.0.0"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(StoreError, match=r"c\.1\.0\.0\.0: Permission denied; check its permissions"):
        inspect_store(store.path, check=True)


def test_a_commit_that_comes_between_is_not_taken_for_damage(
    full_store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilesam.store import check

    real = check.shard_listing
    commits = []

    def then_committed_anew(manifest: Any, shard: int, size: int) -> Any:
        listing = real(manifest, shard, size)
        if shard == 1 and not commits:
            commits.append(shard)
            full_store.withdraw([1])
            compute(full_store, embeddings(seed=9))
        return listing

    monkeypatch.setattr(check, "shard_listing", then_committed_anew)
    assert _found(full_store) == []
    assert commits == [1]


def test_progress_counts_rows_up_to_all_of_them(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobilesam.store.check.GROUP_SHARDS", 2)
    heard: list[tuple[int, int]] = []
    inspect_store(store.path, check=True, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(6, 8), (8, 8)]


def test_the_command_repeats_what_was_asked_for_in_words_that_a_shell_gives_back(tmp_path: Path) -> None:
    sources = ("/my photos/it's", os.fsdecode(b"/caf\xe9\n"), "/日本")
    selection = Selection(fraction=0.25, seed=7, limit=8, sources=sources, checkpoint="/w/sam b.pth")
    path = tmp_path / "my store.zarr"
    EmbeddingStore.create(path, make_spec(), images(), selection, HEAD).close()
    result = inspect_store(path)
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {result['command']}"], capture_output=True, check=True
    ).stdout.split(b"\0")[:-1]
    assert [os.fsdecode(word) for word in words] == [
        "mobilesam", "precompute", "--images", *sources, "--out", str(path), "--teacher", "vit_nano",
        "--checkpoint", "/w/sam b.pth", "--fraction", "0.25", "--seed", "7", "--limit", "8",
    ]  # fmt: skip
    assert json.loads(json.dumps(result)) == result


def test_names_that_cant_be_printed_are_escaped_in_lines(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    new = [ImageRef(key=os.fsdecode(b"caf\xe9\n.jpg"), size=100)]
    with EmbeddingStore.create(path, make_spec(), new, EVERYTHING, HEAD) as store:
        compute(store, embeddings())
        _flip(_file(store, 0), 0)
    (line,) = (
        line for line in inspection_lines(inspect_store(path, check=True)) if line.startswith("problem")
    )
    assert r"caf\udce9\n.jpg" in line
    assert line.isprintable()


def test_a_plain_inspection_imports_nothing_heavy(store: EmbeddingStore) -> None:
    script = (
        "import sys\n"
        "from mobilesam.store.inspection import inspect_store\n"
        "from mobilesam.store.inspection import inspection_lines\n"
        "inspection_lines(inspect_store(sys.argv[1]))\n"
        "print(sorted({'torch', 'zarr', 'dask', 'safetensors', 'distributed'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(store.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_a_shard_is_checked_in_the_memory_of_one_row(tmp_path: Path) -> None:
    import tracemalloc

    rows, spec = 24, make_spec(shard_size=24, image_size=512, dtype="float32")
    path, emb_CHW = tmp_path / "s.zarr", np.zeros((256, 32, 32), np.float32)
    with EmbeddingStore.create(path, spec, images(rows), EVERYTHING, HEAD) as store:
        compute(store, np.broadcast_to(emb_CHW, (rows, *emb_CHW.shape)))
        listing = shard_listing(store.manifest, 0, rows)
    assert listing is not None
    tracemalloc.start()
    assert check_shard(path, spec, listing) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * emb_CHW.nbytes
