"""What is told while a cluster has no workers; and a folder that killed runs leave behind."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from distributed import LocalCluster
from listener import Listener

from mobilesam.common.signals import StopRequest
from mobilesam.precompute import PrecomputeError, Snapshot
from mobilesam.precompute import supervision as watch
from mobilesam.precompute.cluster import scratch_folder
from mobilesam.precompute.supervision import Watch

Run = Callable[..., dict[str, Any]]


class FakeCluster:
    address = "tcp://somewhere:1"
    client = None

    def __init__(self, local: bool) -> None:
        self.local = local
        self.count = 1

    def refuse_lost_connection(self) -> None: ...

    def count_workers(self) -> int:
        return self.count


def _watched(local: bool) -> tuple[FakeCluster, Listener, Callable[[float], None]]:
    """A cluster, what is told of it, and a function that looks at it as if some seconds had passed."""
    cluster, listener = FakeCluster(local), Listener()
    watching = Watch(cluster, "run", listener, StopRequest())
    now = [0.0]
    watching._clock = lambda: now[0]

    def after(seconds: float) -> None:
        now[0] += seconds
        watching.look()

    return cluster, listener, after


def test_absent_workers_are_told_once_a_minute_and_so_is_their_return() -> None:
    cluster, listener, after = _watched(local=False)
    for _ in range(4):
        after(5)
    cluster.count = 0
    for _ in range(6):
        after(5)
    assert listener.messages == [], "one that is restarted is away for a moment"
    for _ in range(24):
        after(5)
    assert listener.messages == ["no workers at tcp://somewhere:1; waiting"] * 2
    after(3600)
    cluster.count = 3
    after(0.1)  # a run may be over in less than the time between two looks
    after(5)
    assert listener.messages[2:] == [
        "no workers at tcp://somewhere:1; waiting",
        "3 worker(s) at tcp://somewhere:1 again",
    ]


def test_a_local_cluster_whose_workers_are_not_replaced_ends_the_run() -> None:
    cluster, _, after = _watched(local=True)
    after(5)
    cluster.count = 0
    after(5)
    after(290)
    with pytest.raises(
        PrecomputeError, match=r"ended 300 s ago and none could be started again.*same command"
    ):
        after(10)


class Leaving(Listener):
    """Sends a cluster's workers away once something is computed, and has one come when that is told."""

    def __init__(self, cluster: LocalCluster) -> None:
        super().__init__()
        self._cluster = cluster
        self._left = False

    def message(self, text: str) -> None:
        super().message(text)
        if text.startswith("no workers"):
            Timer(0, self._cluster.scale, [1]).start()

    def progress(self, snapshot: Snapshot) -> None:
        if snapshot.computed and not self._left:
            self._left = True
            self._cluster.scale(0)
            while self._cluster.scheduler.workers:
                time.sleep(0.01)  # else the rest could be computed first


def test_a_run_goes_on_when_workers_return_to_a_scheduler_that_had_none(
    run: Run, own_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(watch, "ABSENT_SECONDS", 0.3)
    listener, address = Leaving(own_cluster), own_cluster.scheduler_address
    result = run(scheduler=address, shard_size=1, observer=listener)
    assert (result["done"], result["failed"]) == (7, 0)
    assert f"no workers at {address}; waiting" in listener.messages
    assert f"1 worker(s) at {address} again" in listener.messages


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def test_only_folders_of_dead_runs_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("mobilesam-dead", "mobilesam-alive", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "coordinator.lock").touch()
        (tmp_path / name / "spilled").touch()
    (tmp_path / "mobilesam-foreign").mkdir()
    (tmp_path / "mobilesam-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mobilesam-trap").mkdir()
    (tmp_path / "mobilesam-trap" / "coordinator.lock").symlink_to(tmp_path / "elsewhere" / "coordinator.lock")
    before = {path.name for path in tmp_path.iterdir()}
    with _locked(tmp_path / "mobilesam-alive" / "coordinator.lock"):
        with scratch_folder() as mine:
            assert Path(mine).parent == tmp_path
            with scratch_folder() as another:
                assert mine != another
                assert (Path(mine) / "coordinator.lock").exists()
        assert {path.name for path in tmp_path.iterdir()} == before - {"mobilesam-dead"}
        assert (tmp_path / "mobilesam-alive" / "spilled").exists()
        assert (tmp_path / "elsewhere" / "spilled").exists()
