"""Clusters that are absent, don't start or are lost; the workers' part in a plan; scratch folders."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster
from distributed.comm import CommClosedError
from precompute_command import committed

from mobilesam.precompute import PrecomputeError, Snapshot, dry_run
from mobilesam.precompute.cluster import scratch_folder
from mobilesam.precompute.config import PrecomputeConfig
from mobilesam.precompute.progress import SilentObserver
from mobilesam.store import EmbeddingStore

Run = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("address", ["bogus", "foo://host:1"])
def test_an_invalid_scheduler_address_is_refused_by_name(
    run: Run, address: str, recwarn: pytest.WarningsRecorder
) -> None:
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


class _Closing(SilentObserver):
    """Observer that closes a cluster as soon as something is committed."""

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


def test_workers_that_dont_start_end_the_run_with_the_likely_causes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(**_: object) -> None:
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr("mobilesam.precompute.cluster.LocalCluster", failing)
    with pytest.raises(
        PrecomputeError, match=r"the 2 worker process.*did not start .*is there memory for them"
    ):
        run(scheduler=None, workers=2)


def test_a_worker_that_dies_while_it_releases_its_teacher_costs_nothing(
    run: Run, scheduler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def closed(*_: object) -> None:
        raise CommClosedError("Stream is closed")

    monkeypatch.setattr("distributed.Client.unregister_worker_plugin", closed)
    assert run(scheduler=scheduler)["done"] == 7
    assert "could not be asked to release the teacher" in caplog.text


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
