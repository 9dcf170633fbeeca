"""Full and read-only disks, and missing permissions: one clear error, nothing lost, and a rerun completes."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.disks.jobs import clear, embed, names, student_bytes, train
from faults.disks.tmpfs import CallResult, Disk, small_disk
from faults.fault_log import FaultLog
from faults.fixtures import contents, environment, mobilesam, refused, save_pictures
from faults.recovery import Snapshot, missing_rows, stray_files, wrong_reads

from mobilesam.store.inspection import inspect_store
from mobilesam.verify import VerifyConfig, verify

pytestmark = pytest.mark.fault

Run = Callable[..., dict[str, Any]]
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    """Disk of 256 MiB; empty_disk empties it for each test."""
    try:
        with small_disk(tmp_path_factory.mktemp("disk") / "mount", 256 * MIB) as made:
            yield made
    except OSError as error:
        pytest.skip(f"no disk can be mounted here: {error}")


@pytest.fixture
def empty_disk(disk: Disk) -> Iterator[Disk]:
    yield disk
    disk.read_only(on=False)
    disk.call(clear, disk.path)


def phase_of(outcome: CallResult, root: Path) -> str:
    """Return the phase that ran out of space, by the file that the error names."""
    assert outcome.error is not None
    assert "free some" in outcome.message, outcome
    match = re.search(rf"{re.escape(str(root))}/?([^:;]*)", outcome.message)
    assert match, outcome
    return re.sub(r"\.?[0-9a-f]{8,12}|\.partial|\d+", "", Path(match[1]).name) or "folder"


FREE_KIB = [
    0,
    4,
    8,
    12,
    16,
    24,
    32,
    40,
    48,
    56,
    64,
    68,
    72,
    76,
    80,
    96,
    112,
    128,
    160,
    192,
    256,
    512,
    1024,
    4096,
    16000,
    *range(16040, 16200, 8),
]
"""Free space to leave; of a store of seven rows the head takes 16 MiB."""


def fill_and_resume(
    disk: Disk, fault_log: FaultLog, undisturbed: Snapshot, promised: set[str], free: int, **options: Any
) -> str | None:
    """Leave `free` bytes, precompute until they are used up, free space and resume.

    Returns the phase that ran out of space, None if the space sufficed. `promised` rows must be readable throughout.
    """
    store = options["out"]
    disk.leave(free)
    first = disk.call(embed, **options)
    wrong = disk.call(wrong_reads, store, undisturbed).value
    lost = promised & set(disk.call(missing_rows, store, undisturbed).value)
    disk.leave(None)
    phase = None
    if first.error:
        # A store is created in a partial folder beside its path; messages name its path in both stages.
        stage = "filling" if disk.call(os.path.lexists, store).value else "creation"
        phase = f"store {stage}, {phase_of(first, disk.path)}"
    again = disk.call(embed, **options)
    assert again.value, again
    wrong += disk.call(wrong_reads, store, undisturbed).value
    lost |= set(disk.call(missing_rows, store, undisturbed).value)
    fault_log.record(
        call="disk-full", ordinal=free, file=str(store.name), phase=str(phase), fired=phase is not None,
        lost=len(lost), wrong=len(wrong), role="coordinator",
    )  # fmt: skip
    assert (lost, wrong) == (set(), [])
    assert disk.call(stray_files, store, undisturbed).value == []
    disk.call(clear, disk.path)
    return phase


def test_a_full_disk_while_a_store_is_made_and_filled(
    run: Run,
    fault_log: FaultLog,
    empty_disk: Disk,
    tmp_path: Path,
    pictures: Path,
    many: Callable[[int, int], int],
) -> None:
    # Creating the manifest needs space that is freed again: only larger rows can run out of it.
    settings = {"precision": "float32", "dtype": "float32"}
    run("undisturbed.zarr", **settings)
    undisturbed = Snapshot.of(tmp_path / "undisturbed.zarr")
    options = {"images": (pictures,), "out": empty_disk.path / "store.zarr", **settings}
    phases = {
        fill_and_resume(empty_disk, fault_log, undisturbed, set(), free * KIB, **options)
        for free in FREE_KIB[:: many(1, 4)]
    }
    assert len(phases - {None}) >= many(4, 2), phases


def test_a_full_disk_while_a_store_is_extended(
    run: Run,
    fault_log: FaultLog,
    empty_disk: Disk,
    tmp_path: Path,
    pictures: Path,
    many: Callable[[int, int], int],
) -> None:
    """The shard that was complete stays so; shards and manifest run out of space in turn."""
    run("undisturbed.zarr", precision="float32")
    undisturbed = Snapshot.of(tmp_path / "undisturbed.zarr")
    promised = set(list(undisturbed.rows)[:3])
    options = {"images": (pictures,), "out": empty_disk.path / "store.zarr", "precision": "float32"}
    phases = set()
    for free in range(0, 128, many(4, 24)):
        assert empty_disk.call(embed, limit=3, **options).value
        phases.add(
            fill_and_resume(empty_disk, fault_log, undisturbed, promised, free * KIB, extend=True, **options)
        )
    assert len(phases - {None}) >= 2, phases


def test_a_full_disk_while_a_student_is_trained(
    run: Run, fault_log: FaultLog, empty_disk: Disk, tmp_path: Path, many: Callable[[int, int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Config, head, metrics, checkpoint and student run out of space in turn."""
    monkeypatch.chdir(tmp_path)
    disk, place = empty_disk, empty_disk.path / "run"
    run()
    options = {"store": tmp_path / "store.zarr"}
    assert disk.call(os.chdir, tmp_path).error is None
    # In the same process: number of threads and allocator may differ in this one, and with them the last bits.
    whole = disk.call(train, out=tmp_path / "whole", **options).value
    phases = set()
    for free in [0, 8, 17 * KIB, 40 * KIB, 90 * KIB, 110 * KIB, 160 * KIB, 200 * KIB][:: many(1, 3)]:
        disk.leave(free * KIB)
        first = disk.call(train, out=place, **options)
        disk.leave(None)
        again = disk.call(train, out=place, **options)
        phase = phase_of(first, disk.path) if first.error else None
        wrong = (
            again.value is None
            or again.value["val"] != whole["val"]
            or again.value["steps"] != whole["steps"]
        )
        fault_log.record(
            call="disk-full", ordinal=free, file="run", phase=f"training, {phase}", fired=phase is not None,
            lost=int(wrong), wrong=0, role="trainer",
        )  # fmt: skip
        assert not wrong, (again, whole)
        ours, theirs = (disk.call(student_bytes, folder).value for folder in (place, tmp_path / "whole"))
        assert ours == theirs
        assert disk.call(names, place).value == names(tmp_path / "whole")
        phases.add(phase)
        disk.call(clear, disk.path)
    assert len(phases - {None}) >= 2, phases


def test_a_read_only_disk_is_read_and_not_written(
    run: Run,
    fault_log: FaultLog,
    empty_disk: Disk,
    tmp_path: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    disk, store = empty_disk, empty_disk.path / "store.zarr"
    run("undisturbed.zarr", precision="float32")
    undisturbed = Snapshot.of(tmp_path / "undisturbed.zarr")
    options = {"images": (pictures,), "out": store, "precision": "float32"}
    assert disk.call(embed, **options).value
    assert disk.call(os.chdir, tmp_path).error is None
    before = disk.call(contents, store).value
    disk.read_only(on=True)
    for change in ({}, {"retry_failed": True}, {"out": disk.path / "new.zarr"}):
        outcome = disk.call(embed, **(options | change))
        assert outcome.error == "StoreError", outcome
        assert "writable" in outcome.message or "can't be written" in outcome.message
    wrong = disk.call(wrong_reads, store, undisturbed).value
    lost = disk.call(missing_rows, store, undisturbed).value
    checked = disk.call(inspect_store, store, check=True)
    assert checked.value["problems"] == []
    assert disk.call(train, store=store, out=tmp_path / "run").value
    assert disk.call(verify, VerifyConfig(student=tmp_path / "run", split="all")).value["images"] == 7
    repaired = disk.call(inspect_store, store, repair=True)
    assert repaired.error == "StoreError", repaired
    fault_log.record(
        call="read-only", ordinal=0, file="store.zarr", phase="precompute, inspect, distill, verify", fired=True,
        lost=len(lost), wrong=len(wrong), role="coordinator",
    )  # fmt: skip
    assert (lost, wrong) == ([], [])
    disk.read_only(on=False)
    assert disk.call(contents, store).value == before
    assert disk.call(embed, **options).value["done_before"] == 7


def test_the_command_line_reports_a_full_or_read_only_disk_with_exit_code_3(
    fault_log: FaultLog, empty_disk: Disk, pictures: Path
) -> None:
    disk, store = empty_disk, empty_disk.path / "store.zarr"
    command = (
        "precompute",
        "--images",
        pictures,
        "--out",
        store,
        "--teacher",
        "vit_nano",
        "--image-size",
        "64",
        "--json",
    )
    disk.leave(64 * KIB)
    refused(mobilesam(*command, prefix=disk.prefix), "free some")
    disk.leave(None)
    done = mobilesam(*command, prefix=disk.prefix)
    assert (done.code, done.json["done"]) == (0, 7), done.err
    disk.read_only(on=True)
    refused(mobilesam(*command, prefix=disk.prefix), "writable")
    looked = mobilesam("inspect", store, "--check", "--json", prefix=disk.prefix)
    assert (looked.code, looked.json["problems"]) == (0, []), looked.err
    for action in ("disk-full", "read-only"):
        fault_log.record(
            call=action, ordinal=0, file="store.zarr", phase="command line", fired=True,
            lost=7 - looked.json["rows"]["done"], wrong=0, role="coordinator",
        )  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run as another user")
def test_without_permission_nothing_is_written_and_nothing_lost(fault_log: FaultLog) -> None:
    """Commands of another user: reads work, writes are refused."""
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
    # Other users cannot enter pytest's own folders.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        photos, store = save_pictures(folder / "photos"), folder / "store.zarr"
        command = (
            "precompute", "--images", photos, "--out", store, "--teacher", "vit_nano", "--image-size", "64", "--json"
        )  # fmt: skip
        env = environment(HOME=str(folder / "home"))
        (folder / "home").mkdir()
        os.chown(folder / "home", 65534, 65534)
        refused(mobilesam(*command, prefix=nobody, env=env), "Permission denied; check its permissions")
        assert not store.exists()
        assert mobilesam(*command, env=env).code == 0
        undisturbed, before = Snapshot.of(store), contents(store)
        refused(mobilesam(*command, prefix=nobody, env=env), "permission")
        refused(mobilesam("inspect", store, "--repair", prefix=nobody, env=env), "permission")
        looked = mobilesam("inspect", store, "--check", "--json", prefix=nobody, env=env)
        assert (looked.code, looked.json["problems"]) == (0, []), looked.err
        (photos / "2.png").chmod(0)
        store.joinpath("embeddings", "c.0.0.0.0").chmod(0)
        looked = mobilesam("inspect", store, "--check", "--json", prefix=nobody, env=env)
        assert looked.code in (1, 3), looked
        assert "ermission" in looked.out + looked.err
        store.joinpath("embeddings", "c.0.0.0.0").chmod(0o644)
        wrong, lost = wrong_reads(store, undisturbed), missing_rows(store, undisturbed)
        fault_log.record(
            call="permission", ordinal=0, file="store.zarr", phase="precompute, inspect", fired=True, lost=len(lost),
            wrong=len(wrong), role="coordinator",
        )  # fmt: skip
        assert contents(store) == before
        assert (lost, wrong) == ([], [])
