"""Copies of small stores that are damaged, read, checked and repaired."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from faults.fault_log import FaultLog
from faults.fixtures import contents
from faults.recovery import Snapshot, missing_rows, stray_files, wrong_reads
from small_store import EVERYTHING, HEAD, compute, embeddings, images, make_spec

from mobilesam.store import EmbeddingStore, StoreError
from mobilesam.store.inspection import inspect_store

Damage = Callable[[Path], None]


def new_store(path: Path, dtype: str, seed: int = 0) -> None:
    """Write a complete store of 8 rows in shards of 3."""
    with EmbeddingStore.create(path, make_spec(dtype=dtype), images(), EVERYTHING, HEAD) as store:
        compute(store, embeddings(seed=seed))


class IntactStore:
    """Complete, undamaged store, with its snapshot and files."""

    def __init__(self, path: Path, dtype: str, seed: int) -> None:
        self.path = path
        new_store(path, dtype, seed)

    @cached_property
    def undisturbed(self) -> Snapshot:
        return Snapshot.of(self.path)

    @cached_property
    def contents(self) -> dict[str, bytes | None]:
        return contents(self.path)


class DamagedStores:
    """Intact stores by dtype and seed, and damage done to copies of them."""

    def __init__(self, folder: Path, fault_log: FaultLog) -> None:
        self._folder = folder
        self._fault_log = fault_log
        self._number = 0
        self._stores: dict[tuple[str, int], IntactStore] = {}

    def intact(self, dtype: str = "float16", seed: int = 0) -> Path:
        """Return the path of an intact store, which must not be changed."""
        return self._intact(dtype, seed).path

    def _intact(self, dtype: str, seed: int = 0) -> IntactStore:
        if (dtype, seed) not in self._stores:
            self._stores[dtype, seed] = IntactStore(self._folder / f"{dtype}-{seed}.zarr", dtype, seed)
        return self._stores[dtype, seed]

    def copy(self, dtype: str = "float16") -> tuple[Path, Snapshot]:
        """Copy a store; return the copy's path and the store's snapshot."""
        intact = self._intact(dtype)
        self._number += 1
        path = self._folder / f"{self._number}.zarr"
        shutil.copytree(intact.path, path)
        return path, intact.undisturbed

    def damage_and_repair(
        self, damage: Damage, *, call: str, phase: str, file: str, ordinal: int = 0, dtype: str = "float16"
    ) -> list[dict[str, Any]]:
        """Damage a copy of an intact store, read, check and repair it; return the problems that the check found.

        Asserts that nothing was read wrongly, and that the repaired store equals the intact one.

        Args:
            damage: Function that damages the store at a path.
            call: Kind of damage, for the fault log.
            phase: Part of the store that is damaged, for the fault log.
            file: File that is damaged, for the fault log.
            ordinal: Bit or length, for the fault log.
            dtype: Dtype of the store.
        """
        intact = self._intact(dtype)
        path, _ = self.copy(dtype)
        damage(path)
        fired = contents(path) != intact.contents
        wrong = wrong_reads(path, intact.undisturbed)
        unreadable = missing_rows(path, intact.undisturbed)
        problems = found_problems(path)
        repair_store(path, dtype)
        wrong += wrong_reads(path, intact.undisturbed)
        lost = missing_rows(path, intact.undisturbed)
        self._fault_log.record(
            call=call, ordinal=ordinal, file=file, phase=phase, fired=fired, lost=len(lost), wrong=len(wrong)
        )
        assert not wrong
        assert not lost
        assert fired
        assert problems or not unreadable, "rows cannot be read, and the check finds nothing"
        assert stray_files(path, intact.undisturbed) == []
        assert found_problems(path) == []
        shutil.rmtree(path)
        return problems


def found_problems(path: Path) -> list[dict[str, Any]]:
    """Return the check's problems; an error that ends the check counts as one."""
    try:
        return inspect_store(path, check=True)["problems"]
    except StoreError as error:
        return [{"kind": "error", "message": str(error), "file": None, "shard": None, "row": None}]


def repair_store(path: Path, dtype: str) -> None:
    """Follow the messages: repair and compute what is pending, or else write the store again."""
    try:
        left = inspect_store(path, repair=True)["problems"]
        unrepaired = [problem["message"] for problem in left if problem["kind"] != "head"]
    except StoreError as error:
        unrepaired = [str(error)]
    if unrepaired:
        assert any(
            remedy in message
            for remedy in ("make the store again", "precompute a new store", "restore it", "back")
            for message in unrepaired
        ), unrepaired
        shutil.rmtree(path)
        new_store(path, dtype)
        return
    with EmbeddingStore.open(path, writable=True) as store:
        store.restore_head(HEAD)
        compute(store, embeddings())


def shard(path: Path, number: int, array: str = "embeddings") -> Path:
    """Return the path of a shard's file."""
    return path / array / (f"c.{number}.0" if array == "scales" else f"c.{number}.0.0.0")


def named(problems: list[dict[str, Any]], number: int, array: str = "embeddings") -> bool:
    """Return True if a problem names the shard or its file."""
    name = f"{array}/{shard(Path(), number, array).name}"
    return any(problem["shard"] == number or str(problem["file"]).endswith(name) for problem in problems)
