"""Reports while a cluster has no workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Timer
from typing import Any

import pytest
from distributed import LocalCluster
from listener import Listener

from mobilesam.common.signals import StopFlag
from mobilesam.precompute import PrecomputeError, Snapshot, supervision
from mobilesam.precompute.supervision import ClusterMonitor

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


def _monitored(local: bool) -> tuple[FakeCluster, Listener, Callable[[float], None]]:
    """Make a cluster, the listener to its monitor, and a function that has it checked some seconds later."""
    cluster, listener = FakeCluster(local), Listener()
    monitor = ClusterMonitor(cluster, "run", listener, StopFlag())
    now = [0.0]
    monitor._clock = lambda: now[0]

    def after(seconds: float) -> None:
        now[0] += seconds
        monitor.check()

    return cluster, listener, after


def test_absent_workers_are_reported_once_a_minute_and_their_return_at_once() -> None:
    cluster, listener, after = _monitored(local=False)
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
    after(0.1)  # a run may be over in less than the time between two counts
    after(5)
    assert listener.messages[2:] == [
        "no workers at tcp://somewhere:1; waiting",
        "3 workers at tcp://somewhere:1 again",
    ]


def test_a_local_cluster_whose_workers_are_not_replaced_ends_the_run() -> None:
    cluster, _, after = _monitored(local=True)
    after(5)
    cluster.count = 0
    after(5)
    after(290)
    with pytest.raises(
        PrecomputeError, match=r"ended 300 s ago and none could be started again.*same command"
    ):
        after(10)


class Leaving(Listener):
    """Observer that stops a cluster's workers once something is computed, and starts one when absence is reported."""

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


def test_a_run_continues_when_workers_return_to_a_scheduler_that_had_none(
    run: Run, own_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "COUNT_SECONDS", 0.2)
    monkeypatch.setattr(supervision, "ABSENT_SECONDS", 0.3)
    listener, address = Leaving(own_cluster), own_cluster.scheduler_address
    result = run(scheduler=address, shard_size=1, observer=listener)
    assert (result["done"], result["failed"]) == (7, 0)
    assert f"no workers at {address}; waiting" in listener.messages
    assert f"1 worker at {address} again" in listener.messages
