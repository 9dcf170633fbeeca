"""Small whole stores, and copies of them that are damaged, read, checked and mended."""

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
    """A whole store of 8 rows in shards of 3."""
    with EmbeddingStore.create(path, make_spec(dtype=dtype), images(), EVERYTHING, HEAD) as store:
        compute(store, embeddings(seed=seed))


class Whole:
    """A store that nothing happened to."""

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
    """Whole stores by dtype and seed, and what their copies suffer."""

    def __init__(self, folder: Path, fault_log: FaultLog) -> None:
        self._folder = folder
        self._ledger = fault_log
        self._number = 0
        self._wholes: dict[tuple[str, int], Whole] = {}

    def whole(self, dtype: str = "float16", seed: int = 0) -> Path:
        """A whole store; nobody changes it."""
        return self._whole(dtype, seed).path

    def _whole(self, dtype: str, seed: int = 0) -> Whole:
        if (dtype, seed) not in self._wholes:
            self._wholes[dtype, seed] = Whole(self._folder / f"{dtype}-{seed}.zarr", dtype, seed)
        return self._wholes[dtype, seed]

    def copy(self, dtype: str = "float16") -> tuple[Path, Snapshot]:
        """A copy that may be damaged, and what is in it."""
        whole = self._whole(dtype)
        self._number += 1
        path = self._folder / f"{self._number}.zarr"
        shutil.copytree(whole.path, path)
        return path, whole.undisturbed

    def damage_and_repair(
        self, damage: Damage, *, call: str, phase: str, file: str, ordinal: int = 0, dtype: str = "float16"
    ) -> list[dict[str, Any]]:
        """Damage a copy of a whole store, read it, check it, mend it; what the check found.

        Nothing may have been read wrongly, and in the end everything must be there again and nothing else.
        """
        whole = self._whole(dtype)
        path, _ = self.copy(dtype)
        damage(path)
        fired = contents(path) != whole.contents
        wrong = wrong_reads(path, whole.undisturbed)
        unreadable = missing_rows(path, whole.undisturbed)
        problems = found_problems(path)
        mend(path, dtype)
        wrong += wrong_reads(path, whole.undisturbed)
        lost = missing_rows(path, whole.undisturbed)
        self._ledger.record(
            call=call, ordinal=ordinal, file=file, phase=phase, fired=fired, lost=len(lost), wrong=len(wrong)
        )
        assert not wrong
        assert not lost
        assert fired
        assert problems or not unreadable, "rows can't be read, and the check finds nothing"
        assert stray_files(path, whole.undisturbed) == []
        assert found_problems(path) == []
        shutil.rmtree(path)
        return problems


def found_problems(path: Path) -> list[dict[str, Any]]:
    """What the check names; an error that it can't go on from is a finding too."""
    try:
        return inspect_store(path, check=True)["problems"]
    except StoreError as error:
        return [{"kind": "error", "message": str(error), "file": None, "shard": None, "row": None}]


def mend(path: Path, dtype: str) -> None:
    """What the messages say: repair and compute what is pending, or make the store again."""
    try:
        left = inspect_store(path, repair=True)["problems"]
        beyond = [problem["message"] for problem in left if problem["kind"] != "head"]
    except StoreError as error:
        beyond = [str(error)]
    if beyond:
        assert any(
            mend in message
            for mend in ("make the store again", "precompute again", "back")
            for message in beyond
        ), beyond
        shutil.rmtree(path)
        new_store(path, dtype)
        return
    with EmbeddingStore.open(path, writable=True) as store:
        store.restore_head(HEAD)
        compute(store, embeddings())


def shard(path: Path, number: int, array: str = "embeddings") -> Path:
    """Where a shard's file is."""
    return path / array / (f"c.{number}.0" if array == "scales" else f"c.{number}.0.0.0")


def named(problems: list[dict[str, Any]], number: int, array: str = "embeddings") -> bool:
    """Whether the check names the shard, or its file."""
    name = f"{array}/{shard(Path(), number, array).name}"
    return any(problem["shard"] == number or str(problem["file"]).endswith(name) for problem in problems)
