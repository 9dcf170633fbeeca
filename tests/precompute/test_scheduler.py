"""Shards and images that are blamed when workers die."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import KilledWorker
from listener import Listener

from mobilesam.precompute import scheduler, shard_task, supervision
from mobilesam.precompute.messages import ShardResult, ShardTask
from mobilesam.precompute.scheduler import ShardScheduler
from mobilesam.store import EmbeddingStore

Run = Callable[..., dict[str, Any]]


def _killed() -> KilledWorker:
    return KilledWorker("shard", SimpleNamespace(address="tcp://somewhere:1"), 2)


def _deadly(task: ShardTask) -> bool:
    return any(image.ref.key == "2-coffee.png" and image.excluded is None for image in task.images)


def _compute(task: ShardTask, plugin_name: str) -> ShardResult:
    """Shard 0 holds the deadly image, and ends after shard 1, which dies once because it ran beside it."""
    once, handled = task.store / "died", task.store / "handled"
    if task.shard == 1 and not once.exists():
        once.touch()
        raise _killed()
    if _deadly(task):
        while not handled.exists():
            time.sleep(0.01)
        raise _killed()
    return shard_task.compute_shard(task, plugin_name)


def _handle_killed_worker(self: ShardScheduler, task: ShardTask, error: KilledWorker) -> None:
    """Search as the scheduler does, which waits POLL_SECONDS for other killed shards: here, as long as it takes."""
    (task.store / "handled").touch()
    while any(_deadly(other) and future.status != "error" for future, other in self._in_flight.items()):
        time.sleep(0.01)
    _original(self, task, error)


_original = ShardScheduler._handle_killed_worker


def _probe(task: ShardTask, plugin_name: str) -> bool:
    if _deadly(task):
        raise _killed()
    return True


def test_a_shard_that_ran_beside_the_deadly_one_is_not_blamed(
    run: Run, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "compute_shard", _compute)
    monkeypatch.setattr(supervision, "probe", _probe)
    monkeypatch.setattr(ShardScheduler, "_handle_killed_worker", _handle_killed_worker)
    result = run(observer=listener)
    assert (result["done"], result["failed"]) == (6, 1)
    with EmbeddingStore.open(tmp_path / "store.zarr") as store:
        (record,) = store.manifest.records("failed")
    assert (record.key, record.reason) == ("2-coffee.png", supervision.KILLED_REASON)
    assert [message for message in listener.messages if "workers died" in message] == [
        "workers died under shard 1: looking for the image among its 3",
        "workers died under shard 0: looking for the image among its 3",
    ]
    assert not any("retrying" in message for message in listener.messages)
