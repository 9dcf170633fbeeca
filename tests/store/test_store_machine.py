"""Any order of commits, kills, damage, checks and repairs, against a dictionary of what each row must hold.

A row that is read is what the dictionary says, or an error; a check finds the damage that there is and no other;
after a repair and a resume everything is as if nothing had happened.

Shape suffixes: B rows of a store, C channels, H and W rows and columns of an embedding.
"""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
import tarfile
import tempfile
import zlib
from contextlib import closing, suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from small_store import EVERYTHING, HEAD, SHARD_SIZE, compute, images, make_spec, picture

from mobilesam.store import EmbeddingStore, ShardWriter, StoreError
from mobilesam.store.checksum import CHECKSUM_BYTES, crc32c
from mobilesam.store.inspection import inspect_store
from mobilesam.store.layout import MANIFEST
from mobilesam.store.quantize import quantize
from mobilesam.store.zarr_metadata import write_documents

MOST_ROWS = 14
FAILING = (7, 13)
"""Rows whose image fails every time."""

numbers = st.integers(0, 2**30)


class _Killed(BaseException):
    """What a process that is killed at some point does from there on: nothing."""


def _embedding(row: int) -> np.ndarray:
    return np.random.default_rng(row).normal(0, 3, (256, 4, 4)).astype(np.float32)


class StoreMachine(RuleBasedStateMachine):
    """An int8 store (two arrays) that keeps images, in shards of three."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "s.zarr"
        self.content: dict[int, tuple[bytes, bytes]] = {}
        self.committed: set[int] = set()
        self.mislisted: set[int] = set()
        self.attempts = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # ---- the model

    def _grow(self, count: int) -> None:
        for row in range(len(self.content), len(self.content) + count):
            values_CHW, scales_C = quantize(_embedding(row))
            self.content[row] = values_CHW.tobytes(), scales_C.tobytes()

    def _rows(self, shard: int) -> list[int]:
        return [row for row in self.content if row // SHARD_SIZE == shard]

    def _shards(self) -> list[int]:
        return sorted({row // SHARD_SIZE for row in self.content})

    def _pending(self) -> list[int]:
        return [shard for shard in self._shards() if shard not in self.committed]

    def _file(self, shard: int, array: int) -> Path:
        if array == len(self.spec.layouts):
            return self.path / "embeddings" / "mobilesam" / "images" / f"{shard}.tar"
        layout = self.spec.layouts[array]
        return self.path / layout.name / layout.file_name(shard)

    def _is_damaged(self, shard: int) -> bool:
        """By comparing the files with what they should hold; what lies between rows doesn't matter."""
        if shard in self.mislisted:
            return True
        for array, layout in enumerate(self.spec.layouts):
            path, rows = self._file(shard, array), self._rows(shard)
            if not path.exists():
                return True
            data = path.read_bytes()
            slots = [slot for slot, row in enumerate(rows) if row not in FAILING]
            if len(data) != layout.file_bytes(len(rows)) or not data.endswith(layout.encode_index(slots)):
                return True
            for slot in slots:
                payload = self.content[rows[slot]][array]
                whole = payload + crc32c(payload).to_bytes(CHECKSUM_BYTES, "little")
                start = slot * layout.stride
                if data[start : start + len(whole)] != whole:
                    return True
        path, tar = self._file(shard, len(self.spec.layouts)), self._tar(shard)
        return not path.exists() or path.read_bytes() != tar

    def _tar(self, shard: int) -> bytes:
        """The shard's images, as Python itself writes a tar of them."""
        file, size = io.BytesIO(), 0
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row in self._rows(shard):
                if row not in FAILING:
                    member = tarfile.TarInfo(f"{row:012d}.webp")
                    member.size = len(picture(row))
                    tar.addfile(member, io.BytesIO(picture(row)))
            size = tar.offset
        # It fills up what it writes to a tape's blocks.
        return file.getvalue()[: size + 2 * tarfile.BLOCKSIZE]

    def _damaged(self) -> set[int]:
        return {shard for shard in self.committed if self._is_damaged(shard)}

    def _orphans(self) -> set[str]:
        unlisted = {str(path) for path in self._files() if self._shard(path) not in self.committed}
        return unlisted | {str(path) for path in self.path.rglob("*.partial")}

    def _files(self) -> list[Path]:
        return sorted([*self.path.glob("*/c.*.0"), *self.path.rglob("*.tar")])

    def _shard(self, path: Path) -> int:
        return int(path.stem if path.suffix == ".tar" else path.name.split(".")[1])

    # ---- what happens to a store

    @initialize(rows=st.integers(1, 8), done=st.booleans())
    def create(self, rows: int, done: bool) -> None:
        self.spec = make_spec(dtype="int8", kept_images="webp")
        EmbeddingStore.create(self.path, self.spec, images(rows), EVERYTHING, HEAD).close()
        self._grow(rows)
        if done:
            self.resume()

    def _compute(self, store: EmbeddingStore, shards: list[int]) -> None:
        emb_BCHW = np.stack([_embedding(row) for row in self.content])
        compute(store, emb_BCHW, failed=FAILING, shards=shards)

    @precondition(lambda self: self._pending())
    @rule(which=numbers)
    def commit(self, which: int) -> None:
        shard = self._pending()[which % len(self._pending())]
        with EmbeddingStore.open(self.path, writable=True) as store:
            self._compute(store, [shard])
        self.committed.add(shard)

    @rule()
    def resume(self) -> None:
        with EmbeddingStore.open(self.path, writable=True) as store:
            assert store.pending_shards() == self._pending()
            self._compute(store, self._pending())
        self.committed.update(self._shards())

    @precondition(lambda self: self._pending())
    @rule(
        which=numbers,
        step=st.sampled_from(
            ["writing", "finished", "1 rename", "2 renames", "3 renames", "listing", "listed"]
        ),
    )
    def kill_in_a_commit(self, which: int, step: str) -> None:
        shard = self._pending()[which % len(self._pending())]
        store = EmbeddingStore.open(self.path, writable=True)
        try:
            self._commit_until(store, shard, step)
        except _Killed:
            pass
        finally:
            self._die(store)
        if step == "listed":
            self.committed.add(shard)

    def _commit_until(self, store: EmbeddingStore, shard: int, step: str) -> None:
        if step == "writing":
            self.attempts += 1
            rows = self._rows(shard)
            writer = ShardWriter(
                self.path, self.spec.layouts, shard, f"k{self.attempts}", len(rows), self.spec.kept_images
            )
            writer.__enter__()
            writer.add(0, _embedding(rows[0]), picture(rows[0]))
            writer._close()
        elif step == "finished":
            with mock.patch.object(store, "commit", side_effect=_Killed):
                self._compute(store, [shard])
        elif "rename" in step:
            renames = [*[mock.DEFAULT] * (int(step[0]) - 1), _Killed]
            with mock.patch("os.rename", wraps=os.rename, side_effect=renames):
                self._compute(store, [shard])
        elif step == "listing":
            # In the transaction, when the shard stands there already and its rows don't.
            with mock.patch("mobilesam.store.manifest.shard_digest", side_effect=_Killed):
                self._compute(store, [shard])
        else:
            self._compute(store, [shard])

    def _die(self, store: EmbeddingStore) -> None:
        """Let go of what the kernel lets go of, and clean nothing up."""
        store.manifest.close()
        assert store._lock is not None
        os.close(store._lock._descriptor)

    @precondition(lambda self: self._files())
    @rule(which=numbers, byte=numbers, bit=st.integers(0, 7))
    def flip(self, which: int, byte: int, bit: int) -> None:
        path = self._files()[which % len(self._files())]
        data = bytearray(path.read_bytes())
        if data:
            data[byte % len(data)] ^= 1 << bit
            path.write_bytes(data)

    @precondition(lambda self: self._files())
    @rule(which=numbers, size=numbers)
    def truncate(self, which: int, size: int) -> None:
        path = self._files()[which % len(self._files())]
        os.truncate(path, size % (path.stat().st_size + 1))

    @precondition(lambda self: self._files())
    @rule(which=numbers, wipe=st.booleans())
    def lose(self, which: int, wipe: bool) -> None:
        path = self._files()[which % len(self._files())]
        if wipe:
            path.write_bytes(bytes(path.stat().st_size))
        else:
            path.unlink()

    @precondition(lambda self: len(self._shards()) > 1)
    @rule(which=numbers, further=numbers, array=st.integers(0, 2), copy=st.booleans())
    def swap(self, which: int, further: int, array: int, copy: bool) -> None:
        shards = self._shards()
        place = which % len(shards)
        other = (place + 1 + further % (len(shards) - 1)) % len(shards)
        first, second = self._file(shards[place], array), self._file(shards[other], array)
        if first.exists() and second.exists():
            data, others = first.read_bytes(), second.read_bytes()
            second.write_bytes(data)
            if not copy:
                first.write_bytes(others)

    @precondition(lambda self: self.committed)
    @rule(which=numbers, column=st.sampled_from(["crc32c", "scales_crc32c", "width", "bytes"]))
    def change_listing(self, which: int, column: str) -> None:
        shard = sorted(self.committed)[which % len(self.committed)]
        row = self._rows(shard)[0]
        with closing(sqlite3.connect(self.path / MANIFEST)) as connection, connection:
            connection.execute(
                f"UPDATE results SET {column} = coalesce({column}, 0) + 1 WHERE row = ?", (row,)
            )
        self.mislisted.add(shard)

    @precondition(lambda self: self.committed)
    @rule(which=numbers)
    def withdraw(self, which: int) -> None:
        shard = sorted(self.committed)[which % len(self.committed)]
        with EmbeddingStore.open(self.path, writable=True) as store:
            store.withdraw([shard])
        self._unlist({shard})

    def _unlist(self, shards: set[int]) -> None:
        self.committed -= shards
        self.mislisted -= shards

    @precondition(lambda self: len(self.content) < MOST_ROWS)
    @rule(count=st.integers(1, 4), killed=st.booleans())
    def extend(self, count: int, killed: bool) -> None:
        rows = len(self.content)
        store = EmbeddingStore.open(self.path, writable=True)
        documents = mock.patch(
            "mobilesam.store.store.write_documents",
            wraps=write_documents,
            side_effect=_Killed if killed else None,
        )
        with suppress(_Killed), documents:
            store.extend(images(rows + count)[rows:], EVERYTHING)
        self._die(store)
        if rows % SHARD_SIZE:
            self._unlist({rows // SHARD_SIZE})
        self._grow(count)
        if killed:
            # The next writer finishes it.
            EmbeddingStore.open(self.path, writable=True).close()

    # ---- what must hold

    @invariant()
    def a_row_is_read_as_it_must_be_or_not_at_all(self) -> None:
        damaged = self._damaged()
        with EmbeddingStore.open(self.path) as store:
            for row, (values, scales) in self.content.items():
                shard = row // SHARD_SIZE
                try:
                    batch = store.read([row])
                except StoreError:
                    assert shard in damaged or shard not in self.committed or row in FAILING, row
                    continue
                assert shard in self.committed
                assert row not in FAILING
                assert batch.values.tobytes() == values
                assert batch.scales is not None
                assert batch.scales.tobytes() == scales

    @invariant()
    def an_image_is_read_as_it_must_be_or_not_at_all(self) -> None:
        damaged = self._damaged()
        with EmbeddingStore.open(self.path) as store:
            for row in self.content:
                shard = row // SHARD_SIZE
                try:
                    data = store.read_image(row)
                except StoreError:
                    assert shard in damaged or shard not in self.committed or row in FAILING, row
                    continue
                assert shard in self.committed
                assert row not in FAILING
                assert data == picture(row)

    @invariant()
    def a_check_finds_the_damage_that_there_is(self) -> None:
        problems = inspect_store(self.path, check=True)["problems"]
        assert {p["shard"] for p in problems if p["kind"] != "orphan"} == self._damaged()
        assert {p["file"] for p in problems if p["kind"] == "orphan"} == self._orphans()

    @rule()
    def repair(self) -> None:
        damaged = self._damaged()
        good = {
            path: (path.stat().st_ino, path.stat().st_mtime_ns, zlib.crc32(path.read_bytes()))
            for path in self._files()
            if self._shard(path) in self.committed - damaged
        }
        result = inspect_store(self.path, repair=True)
        assert result["problems"] == []
        assert set(result["repaired"]["withdrawn"]) == damaged
        self._unlist(damaged)
        assert self._orphans() == set()
        assert good == {
            path: (path.stat().st_ino, path.stat().st_mtime_ns, zlib.crc32(path.read_bytes()))
            for path in self._files()
        }

    @rule()
    def repair_and_resume(self) -> None:
        self.repair()
        self.resume()
        assert self._damaged() == set()
        assert inspect_store(self.path, check=True)["problems"] == []
        with EmbeddingStore.open(self.path) as store:
            counts = store.manifest.counts()
            assert (counts.rows, counts.pending) == (len(self.content), 0)
            assert counts.failed == sum(row in self.content for row in FAILING)


def _run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_no_order_of_events_yields_a_wrong_row() -> None:
    _run(examples=12, steps=20)


@pytest.mark.long
def test_no_long_order_of_events_yields_a_wrong_row() -> None:
    _run(examples=100, steps=40)
