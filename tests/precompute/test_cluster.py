"""Clusters that are not as hoped: unknown, measured from afar, lost; and signals while one starts."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from distributed import LocalCluster
from distributed.comm import CommClosedError
from precompute_command import committed

from mobilesam.common.signals import starting_processes
from mobilesam.precompute import PrecomputeError, Snapshot, dry_run
from mobilesam.precompute.config import PrecomputeConfig
from mobilesam.precompute.progress import Silent
from mobilesam.store import EmbeddingStore

Run = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("address", ["bogus", "foo://host:1"])
def test_an_address_that_is_none_is_told(run: Run, address: str, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(PrecomputeError, match=f"no dask scheduler at {address}"):
        run(scheduler=address)
    assert not list(recwarn)


def test_shard_and_batch_size_are_chosen_by_the_clusters_workers(
    run: Run, tmp_path: Path, photos: Path, scheduler: str
) -> None:
    config = PrecomputeConfig(
        images=(photos,), out=tmp_path / "store.zarr", teacher="vit_nano", image_size=64, scheduler=scheduler
    )
    plan = dry_run(config)
    assert plan["shard_size"] == 4, "two shards, so that one is decoded while the other computes"
    assert run(shard_size=None)["done"] == 7
    with EmbeddingStore.open(tmp_path / "store.zarr") as store:
        assert store.spec.shard_size == 4


class _Closing(Silent):
    """Closes a cluster as soon as something is committed."""

    def __init__(self, cluster: LocalCluster, store: Path) -> None:
        self._cluster, self._store = cluster, store

    def progress(self, snapshot: Snapshot) -> None:
        if snapshot.computed and committed(self._store):  # what was computed may yet have to be committed
            self._cluster.close()


def test_a_scheduler_that_goes_away_ends_the_run_and_what_is_committed_stays(
    run: Run, tmp_path: Path, own_cluster: LocalCluster
) -> None:
    address = own_cluster.scheduler_address
    with pytest.raises(
        PrecomputeError, match=f"connection to the dask scheduler at {address} was lost; what is"
    ):
        run(scheduler=address, shard_size=1, observer=_Closing(own_cluster, tmp_path / "store.zarr"))
    with EmbeddingStore.open(tmp_path / "store.zarr") as store:
        done = store.manifest.counts().done
    assert 1 <= done < 7
    assert run(shard_size=1)["done_before"] == done


def test_ctrl_c_while_workers_start_is_heard_afterwards_and_never_by_them() -> None:
    heard: list[int] = []
    masks: list[str] = []

    def start_child() -> None:
        masks.append(subprocess.check_output(["grep", "SigBlk", "/proc/self/status"], text=True))

    before = signal.signal(signal.SIGINT, lambda signum, _: heard.append(signum))
    try:
        with starting_processes():
            thread = Thread(target=start_child)
            thread.start()
            thread.join()
            os.kill(os.getpid(), signal.SIGINT)
            assert heard == []
        assert heard == [signal.SIGINT]
        start_child()
    finally:
        signal.signal(signal.SIGINT, before)
    bit = 1 << signal.SIGINT - 1
    assert [bool(int(mask.split()[1], 16) & bit) for mask in masks] == [True, False]


def test_workers_that_dont_start_are_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(**_: object) -> None:
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr("mobilesam.precompute.cluster.LocalCluster", failing)
    with pytest.raises(
        PrecomputeError, match=r"the 2 worker process.*did not start .*is there memory for them"
    ):
        run(scheduler=None, workers=2)


def test_a_worker_that_dies_while_its_teacher_is_taken_from_it_costs_nothing(
    run: Run, scheduler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def closed(*_: object) -> None:
        raise CommClosedError("Stream is closed")

    monkeypatch.setattr("distributed.Client.unregister_worker_plugin", closed)
    assert run(scheduler=scheduler)["done"] == 7
    assert "couldn't be told to let go of the teacher" in caplog.text
