"""Two processes on one store or run: the second is refused, the first undisturbed; readers are always allowed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.fault_log import FaultLog
from faults.fixtures import HANGING, contents, mobilesam, refused
from faults.recovery import (
    Snapshot,
    digest,
    living_processes,
    missing_rows,
    rerun_and_compare,
    stray_files,
    wrong_reads,
)
from faults.waiting_precompute import committed, precompute_arguments, waiting_writer
from small_store import EVERYTHING, HEAD, compute, embeddings, images, make_spec

from mobilesam.distill import DistillConfig, DistillError, distill
from mobilesam.distill.run_folder import run_lock
from mobilesam.store import EmbeddingStore, StoreError, StoreLocked
from mobilesam.store import lock as lock_module
from mobilesam.store.layout import PRIVATE

pytestmark = pytest.mark.fault

Run = Callable[..., dict[str, Any]]


def test_a_second_precompute_is_refused_with_the_owners_name_and_the_first_continues(
    run: Run, fault_log: FaultLog, tmp_path: Path, pictures: Path
) -> None:
    run("undisturbed.zarr", shard_size=1)
    undisturbed = Snapshot.of(tmp_path / "undisturbed.zarr")
    store = tmp_path / "store.zarr"
    with waiting_writer(tmp_path, pictures, store) as first:
        refused(
            mobilesam(*precompute_arguments(pictures, store)),
            f"process {first.pid} on {socket.gethostname()} is writing to this store: wait for it, or stop it",
        )
        refused(mobilesam("inspect", store, "--repair", "--json"), f"process {first.pid} on")
        assert first.poll() is None, "the first one ended before the second was refused"
        (tmp_path / "gate").touch()
        out, err = first.communicate(timeout=HANGING)
    wrong, lost = wrong_reads(store, undisturbed), missing_rows(store, undisturbed)
    fault_log.record(
        call="second-writer", ordinal=0, file="writer.lock", phase="precompute", fired=True, lost=len(lost),
        wrong=len(wrong), role="coordinator",
    )  # fmt: skip
    assert first.returncode == 0, err
    assert json.loads(out)["done"] == 7
    assert not lost
    assert not wrong
    assert stray_files(store, undisturbed) == []


def test_a_dead_owners_lock_is_released(
    run: Run, fault_log: FaultLog, tmp_path: Path, pictures: Path
) -> None:
    run("undisturbed.zarr", shard_size=1)
    undisturbed = Snapshot.of(tmp_path / "undisturbed.zarr")
    store = tmp_path / "store.zarr"
    with waiting_writer(tmp_path, pictures, store) as owner:
        before = committed(store)
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        left = json.loads((store / PRIVATE / "writer.json").read_bytes())
        assert left == {"host": socket.gethostname(), "pid": owner.pid}
        deadline = time.monotonic() + HANGING
        while living_processes([owner.pid]):
            assert time.monotonic() < deadline, "the dead coordinator's workers still run"
            time.sleep(0.1)
        recovery = rerun_and_compare(store, undisturbed, lambda: run(shard_size=1), sessions=[owner.pid])
    fault_log.record(
        call="kill", ordinal=before, file="writer.lock", phase="lock held", fired=True,
        lost=len(recovery.missing), wrong=len(recovery.wrong), role="coordinator", kill=True,
    )  # fmt: skip
    assert recovery.clean, recovery


OTHER_HOST = {"host": "elsewhere.example", "pid": 7}


def test_another_hosts_owner_file_is_ignored_on_a_local_disk(
    run: Run, fault_log: FaultLog, tmp_path: Path
) -> None:
    """On a local disk a live owner would hold the kernel's lock."""
    run(limit=3)
    run("undisturbed.zarr")
    store, undisturbed = tmp_path / "store.zarr", Snapshot.of(tmp_path / "undisturbed.zarr")
    (store / PRIVATE / "writer.json").write_text(json.dumps(OTHER_HOST))
    recovery = rerun_and_compare(store, undisturbed, lambda: run(extend=True))
    fault_log.record(
        call="other-host", ordinal=0, file="writer.json", phase="local disk", fired=True,
        lost=len(recovery.missing), wrong=len(recovery.wrong),
    )  # fmt: skip
    assert recovery.clean, recovery


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "lustre", "fuse.sshfs", "9p", "cifs", "ceph", "beegfs"])
def test_another_hosts_owner_file_is_refused_where_other_hosts_may_write(
    run: Run, fault_log: FaultLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The mount table is simulated, since no network file system is available."""
    with EmbeddingStore.create(tmp_path / "store.zarr", make_spec(), images(), EVERYTHING, HEAD) as store:
        compute(store, embeddings())
    path = tmp_path / "store.zarr"
    undisturbed = Snapshot.of(path)
    (path / PRIVATE / "writer.json").write_text(json.dumps(OTHER_HOST))
    before = contents(path)
    table = f"1 0 0:1 / / rw - ext4 /dev/x rw\n2 1 0:2 / {tmp_path} rw - {kind} server:/x rw\n"
    read_text = Path.read_text
    with monkeypatch.context() as patch:
        patch.setattr(
            Path,
            "read_text",
            lambda self, *rest: table if str(self) == "/proc/self/mountinfo" else read_text(self, *rest),
        )
        assert lock_module._on_network(path)
        with pytest.raises(
            StoreLocked, match=r"process 7 on elsewhere\.example may be writing .* delete .*writer\.json"
        ):
            EmbeddingStore.open(path, writable=True)
    assert contents(path) == before
    # As the message says: once the file is gone, the store opens.
    (path / PRIVATE / "writer.json").unlink()
    EmbeddingStore.open(path, writable=True).close()
    wrong, lost = wrong_reads(path, undisturbed), missing_rows(path, undisturbed)
    fault_log.record(
        call="other-host", ordinal=0, file="writer.json", phase=f"network disk {kind}", fired=True, lost=len(lost),
        wrong=len(wrong),
    )  # fmt: skip
    assert not lost
    assert not wrong


def test_a_reader_gets_only_right_bytes_while_shards_are_withdrawn_and_committed(
    fault_log: FaultLog, tmp_path: Path, many: Callable[[int, int], int]
) -> None:
    """A read returns the expected bytes, or an error that says the row is not done at that moment."""
    path = tmp_path / "store.zarr"
    with EmbeddingStore.create(path, make_spec(dtype="int8"), images(), EVERYTHING, HEAD) as store:
        compute(store, embeddings())
        undisturbed = Snapshot.of(path)
        stop, wrong, counts = threading.Event(), [], {"read": 0, "refused": 0}
        readers = [
            threading.Thread(target=read_on, args=(path, undisturbed, stop, wrong, counts)) for _ in range(2)
        ]
        for reader in readers:
            reader.start()
        for turn in range(many(300, 60)):
            store.withdraw([turn % 3])
            compute(store, embeddings())
        stop.set()
        for reader in readers:
            reader.join()
    lost = missing_rows(path, undisturbed)
    fault_log.record(
        call="read", ordinal=counts["read"], file="embeddings", phase="while a writer commits",
        fired=counts["read"] > 0, lost=len(lost), wrong=len(wrong),
    )  # fmt: skip
    assert counts["read"] > 50
    assert not wrong
    assert not lost


def read_on(
    path: Path, undisturbed: Snapshot, stop: threading.Event, wrong: list[str], counts: dict[str, int]
) -> None:
    """Read all rows repeatedly, in turn from a store kept open and from a newly opened one."""
    with EmbeddingStore.open(path) as kept:
        while not stop.is_set():
            with EmbeddingStore.open(path) as fresh:
                for store in (kept, fresh):
                    for row in range(8):
                        try:
                            found = digest(store, row)
                        except StoreError as error:
                            if not re.search("is not done|no committed rows", str(error)):
                                wrong.append(f"row {row}: {error}")
                            counts["refused"] += 1
                            continue
                        counts["read"] += 1
                        if found != undisturbed.rows[f"photo{row:04d}.jpg"]:
                            wrong.append(f"row {row}")


def _steady_contents(run: Path) -> dict[str, bytes]:
    """Return a run's files but TensorBoard's, which a thread of the first trainer still writes to."""
    return {name: data for name, data in contents(run).items() if not name.startswith("events.")}


def test_a_second_trainer_of_a_run_is_refused_and_the_first_continues(
    run: Run, fault_log: FaultLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    monkeypatch.chdir(tmp_path)
    config = DistillConfig(
        store=tmp_path / "store.zarr",
        out=tmp_path / "run",
        epochs=1,
        batch_size=4,
        device="cpu",
        precision="float32",
    )
    options = (
        "distill", "--store", config.store, "--out", config.out, "--epochs", "1", "--batch-size", "4",
        "--device", "cpu", "--precision", "float32", "--json",
    )  # fmt: skip
    seen = []

    def intrude(progress: object) -> None:
        """Start a second trainer while the first one trains."""
        if seen:
            return
        before = _steady_contents(config.out)
        seen.append(
            refused(mobilesam(*options, cwd=tmp_path), f"is being trained by process {os.getpid()} on")
        )
        with pytest.raises(DistillError, match="is being trained by"):
            distill(DistillConfig(**{**vars(config), "restart": True}))
        assert _steady_contents(config.out) == before

    first = distill(config, progress=intrude)
    assert seen
    alone = distill(DistillConfig(**{**vars(config), "out": tmp_path / "alone"}))
    lost = first["steps"] != alone["steps"] or first["val"] != alone["val"]
    fault_log.record(
        call="second-trainer", ordinal=0, file="run.lock", phase="distill", fired=True, lost=int(lost), wrong=0,
        role="trainer",
    )  # fmt: skip
    assert not lost
    # The lock ends with its process: nothing has to be deleted.
    with run_lock(config.out):
        pass
