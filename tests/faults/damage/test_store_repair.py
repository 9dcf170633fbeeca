"""Repair of a damaged store by the commands that the messages name: check, repair, precompute."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.damage.corruption import cut, flip, swap, zero
from faults.damage.damaged_stores import shard
from faults.fault_log import FaultLog
from faults.fixtures import HANGING, environment, mobilesam, refused
from faults.recovery import Snapshot, missing_rows, stray_files, wrong_reads

from mobilesam.store import EmbeddingStore, StoreDamaged, StoreError
from mobilesam.store.inspection import inspect_store
from mobilesam.store.layout import HEAD as HEAD_FILE
from mobilesam.store.layout import MANIFEST, PRIVATE

pytestmark = pytest.mark.fault

Run = Callable[..., dict[str, Any]]


def _flip_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 3)


DAMAGES: dict[str, tuple[Callable[[Path], object], list[int]]] = {
    "flip": (lambda path: _flip_middle(shard(path, 1)), [1]),
    "truncate": (lambda path: cut(shard(path, 0), 5000), [0]),
    "zeros": (lambda path: zero(shard(path, 2)), [2]),
    "delete": (lambda path: shard(path, 1).unlink(), [1]),
    "swap": (lambda path: swap(shard(path, 0), shard(path, 1)), [0, 1]),
    "scales": (lambda path: _flip_middle(shard(path, 1, "scales")), [1]),
    "zarr.json": (lambda path: (path / "zarr.json").unlink(), []),
    "array's zarr.json": (lambda path: _flip_middle(path / "embeddings" / "zarr.json"), []),
    "head": (lambda path: _flip_middle(path / HEAD_FILE), []),
    "no head": (lambda path: (path / HEAD_FILE).unlink(), []),
    "orphan": (lambda path: shutil.copy(shard(path, 0), shard(path, 0).with_name("c.9.0.0.0")), []),
    "partial": (lambda path: shutil.copy(shard(path, 0), f"{shard(path, 0)}.0123456789ab.partial"), []),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_repair_and_the_same_run_recompute_only_what_is_damaged(
    run: Run, fault_log: FaultLog, tmp_path: Path, name: str
) -> None:
    """Good shards keep their files, by inode."""
    damage, shards = DAMAGES[name]
    dtype = "int8" if name == "scales" else "float16"
    run(dtype=dtype)
    store = tmp_path / "store.zarr"
    undisturbed, places = Snapshot.of(store), inodes(store)
    damage(store)
    fired = bool(inspect_store(store, check=True)["problems"])
    wrong = wrong_reads(store, undisturbed)
    repaired = inspect_store(store, repair=True)["repaired"]
    result = run(dtype=dtype)
    wrong += wrong_reads(store, undisturbed)
    lost = missing_rows(store, undisturbed)
    fault_log.record(
        call="repair", ordinal=0, file=name, phase=f"precompute after {name}", fired=fired, lost=len(lost),
        wrong=len(wrong),
    )  # fmt: skip
    assert fired
    assert (wrong, lost) == ([], [])
    assert repaired["withdrawn"] == shards
    assert result["done_before"] == 7 - sum(3 if number < 2 else 1 for number in shards)
    assert inspect_store(store, check=True)["problems"] == []
    assert stray_files(store, undisturbed) == []
    kept = {name: inode for name, inode in places.items() if int(name.split(".")[1]) not in shards}
    assert kept.items() <= inodes(store).items()


def inodes(store: Path) -> dict[str, int]:
    return {file.name: file.stat().st_ino for file in (store / "embeddings").glob("c.*")}


def test_an_intact_shard_of_another_teacher_is_found_and_repaired(
    run: Run, fault_log: FaultLog, tmp_path: Path
) -> None:
    """The shard has the same rows and right checksums, but was computed in another precision."""
    run("other.zarr", precision="bfloat16")
    run(precision="float32")
    store = tmp_path / "store.zarr"
    undisturbed = Snapshot.of(store)
    shutil.copy(shard(tmp_path / "other.zarr", 0), shard(store, 0))
    wrong = wrong_reads(store, undisturbed)
    with (
        EmbeddingStore.open(store) as opened,
        pytest.raises(StoreDamaged, match="not those that were committed"),
    ):
        opened.read([0])
    inspect_store(store, repair=True)
    run(precision="float32")
    wrong += wrong_reads(store, undisturbed)
    lost = missing_rows(store, undisturbed)
    fault_log.record(
        call="copy", ordinal=0, file="embeddings", phase="another teacher's shard", fired=True, lost=len(lost),
        wrong=len(wrong),
    )  # fmt: skip
    assert (wrong, lost) == ([], [])


def test_a_lost_manifest_is_an_error_and_the_store_has_to_be_made_again(
    run: Run, fault_log: FaultLog, tmp_path: Path
) -> None:
    run()
    store = tmp_path / "store.zarr"
    undisturbed = Snapshot.of(store)
    (store / MANIFEST).unlink()
    wrong = wrong_reads(store, undisturbed)
    for attempt in (run, lambda: inspect_store(store), lambda: inspect_store(store, repair=True)):
        with pytest.raises(StoreError, match=r"manifest\.sqlite is missing.*again"):
            attempt()
    shutil.rmtree(store)
    run()
    lost = missing_rows(store, undisturbed)
    fault_log.record(
        call="delete", ordinal=0, file=str(MANIFEST), phase="manifest, then the store again", fired=True,
        lost=len(lost), wrong=len(wrong),
    )  # fmt: skip
    assert (wrong, lost) == ([], [])


def test_the_printed_command_repairs_many_damages_at_once(
    run: Run, fault_log: FaultLog, tmp_path: Path, pictures: Path
) -> None:
    """The check exits with 1, repair prints a command, and that line, run in a shell, restores every byte."""
    run()
    store = tmp_path / "store.zarr"
    undisturbed = Snapshot.of(store)
    files = {path.name: path.read_bytes() for path in (store / "embeddings").glob("c.*")}
    _flip_middle(shard(store, 0))
    shard(store, 1).unlink()
    (store / "zarr.json").write_bytes(b"{")
    _flip_middle(store / HEAD_FILE)
    shutil.copy(shard(store, 2), f"{shard(store, 2)}.0123456789ab.partial")
    (store / PRIVATE / "writer.json").write_text("[" * 100_000)
    wrong = wrong_reads(store, undisturbed)
    refused(mobilesam("precompute", "--images", pictures, "--out", store, "--json"), "inspect", "--repair")

    checked = mobilesam("inspect", store, "--check", "--json")
    assert checked.code == 1, checked.err
    kinds = {problem["kind"] for problem in checked.json["problems"]}
    assert kinds == {"checksum", "missing", "metadata", "head", "orphan"}
    printed = mobilesam("inspect", store, "--check")
    assert printed.code == 1
    for name in ("c.0.0.0.0", "c.1.0.0.0", "zarr.json", "sam_head.safetensors", "1.png", "--repair"):
        assert name in printed.out + printed.err, name

    repaired = mobilesam("inspect", store, "--repair", "--json")
    assert repaired.json["repaired"]["withdrawn"] == [0, 1]
    command = repaired.json["command"]
    words = shlex.split(command)
    assert words[:2] == ["mobilesam", "precompute"]
    binary = Path(sys.executable).with_name("mobilesam")
    done = subprocess.run(
        f"{shlex.quote(str(binary))} {command.partition(' ')[2]}",
        shell=True,
        env=environment(),
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGING,
    )
    assert done.returncode == 0, done.stderr
    wrong += wrong_reads(store, undisturbed)
    lost = missing_rows(store, undisturbed)
    fault_log.record(
        call="repair", ordinal=0, file="*", phase="command line", fired=True, lost=len(lost), wrong=len(wrong)
    )
    assert (wrong, lost) == ([], [])
    assert files == {path.name: path.read_bytes() for path in (store / "embeddings").glob("c.*")}
    whole = mobilesam("inspect", store, "--check", "--json")
    assert (whole.code, whole.json["problems"]) == (0, [])
    assert stray_files(store, undisturbed) == []
