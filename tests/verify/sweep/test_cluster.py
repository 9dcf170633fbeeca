"""Sweeps on a dask cluster: one that has two workers in this process, and runs that train nothing or a little."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster, Status, get_worker

from mobilesam.common import dask_client
from mobilesam.common.signals import stopped_by_signals
from mobilesam.distill import DistillConfig, DistillInterrupted, StopFlag
from mobilesam.verify import SweepConfig, VerifyError, sweep
from mobilesam.verify.sweep import cluster as sweep_cluster
from mobilesam.verify.sweep.cluster import ClusterRunner, connected_workers
from mobilesam.verify.sweep.grid import Trial, plan_trials
from mobilesam.verify.sweep.trial import VerifySettings


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """Two workers of three threads each."""
    with LocalCluster(
        n_workers=2, threads_per_worker=3, processes=False, protocol="tcp", dashboard_address=None
    ) as made:
        yield made


class FakeTask:
    """Stand-in for training that takes `seconds`, and records worker, trial, begin and end."""

    def __init__(self, seconds: float = 0.3) -> None:
        self.seconds = seconds
        self.spans: list[tuple[str, str, float, float]] = []

    def __call__(self, sweep: str, trial: Trial, settings: VerifySettings, known: Any) -> dict[str, Any]:
        begun, worker = time.monotonic(), get_worker().address
        time.sleep(self.seconds)
        self.spans.append((worker, trial.name, begun, time.monotonic()))
        return {"name": trial.name, "status": "done", "options": dict(trial.options)}


task = FakeTask()


def _fake(*arguments: Any) -> dict[str, Any]:
    return task(*arguments)


def _plan(**axes: tuple[Any, ...]) -> tuple[list[Trial], VerifySettings]:
    config = SweepConfig(out=Path("sweeps/a"), axes=axes)
    return plan_trials(config, 10), VerifySettings.of(config)


def _run(
    address: str, trials: list[Trial], settings: VerifySettings, messages: list[str] | None = None
) -> list[Any]:
    with connected_workers(address) as client:
        runner = ClusterRunner(
            client, trials, settings, {}, [].append if messages is None else messages.append
        )
        return list(runner.run(StopFlag()))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTask:
    global task
    task = FakeTask()
    monkeypatch.setattr(sweep_cluster, "trial_task", _fake)
    monkeypatch.setattr(sweep_cluster, "POLL_SECONDS", 0.1)
    return task


def test_all_workers_work_and_none_has_two_runs_at_a_time(cluster: LocalCluster, fake: FakeTask) -> None:
    trials, settings = _plan(seed=(0, 1, 2, 3, 4))
    outcomes = _run(cluster.scheduler_address, trials, settings)
    assert {outcome["name"] for outcome in outcomes} == {trial.name for trial in trials}
    assert len({worker for worker, *_ in fake.spans}) == 2
    for worker, _, begun, _ in fake.spans:
        others = [(start, end) for who, _, start, end in fake.spans if who == worker and start != begun]
        assert not [span for span in others if span[0] < begun < span[1]]


def test_a_run_that_begins_with_anothers_student_waits_for_it(cluster: LocalCluster, fake: FakeTask) -> None:
    trials, settings = _plan(objective=("decoupled", "decoder"))
    _run(cluster.scheduler_address, trials, settings)
    (_, first, _, end), (_, second, begun, _) = fake.spans
    assert [first, second] == [trial.name for trial in trials]
    assert end <= begun


def test_a_run_whose_worker_goes_away_goes_on_elsewhere(cluster: LocalCluster, fake: FakeTask) -> None:
    trials, settings = _plan(seed=(0, 1))
    fake.seconds = 1.5
    messages: list[str] = []
    leaving = threading.Timer(0.7, lambda: cluster.scale(1))
    leaving.start()
    outcomes = _run(cluster.scheduler_address, trials, settings, messages)
    leaving.join()
    assert [outcome["status"] for outcome in outcomes] == ["done", "done"]
    assert any("left the cluster" in line for line in messages)


def test_a_run_that_workers_die_of_is_given_up(
    cluster: LocalCluster, fake: FakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials, settings = _plan(seed=(0, 1))
    with connected_workers(cluster.scheduler_address) as client:
        runner = ClusterRunner(client, trials, settings, {}, [].append)
        runner.deaths[trials[0].name] = sweep_cluster.DEATHS_ALLOWED + 1
        monkeypatch.setattr(runner, "_submit", lambda: None)
        assert [outcome["status"] for outcome in runner._abandoned()] == ["failed"]
    assert [trial.name for trial in runner.waiting] == [trials[1].name]


def test_a_cluster_without_workers_or_with_another_version_is_refused(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_cluster, "__version__", "9.9")
    monkeypatch.setattr(sweep_cluster, "worker_version", lambda: "9.8")
    with (
        pytest.raises(VerifyError, match=r"have mobilesam 9\.8, this is 9\.9: install the same"),
        connected_workers(cluster.scheduler_address),
    ):
        pass
    monkeypatch.setattr(dask_client, "CONNECT_SECONDS", 1)
    cluster.scale(0)
    with (
        pytest.raises(VerifyError, match="has no workers after 1 s"),
        connected_workers(cluster.scheduler_address),
    ):
        pass


@pytest.fixture
def one_worker() -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, protocol="tcp", dashboard_address=None
    ) as made:
        yield made


def _training(store: Path, out: Path, **changes: Any) -> SweepConfig:
    base = DistillConfig(store=store, val_fraction=0.4, device="cpu", precision="float32")
    return SweepConfig(out=out, base=base, axes={"epochs": (1,), "batch_size": (1,)}, points=1, **changes)


def test_a_signal_saves_what_is_trained_on_a_worker_and_the_same_command_goes_on_here(
    one_worker: LocalCluster, finished_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store, address = finished_world / "store.zarr", one_worker.scheduler_address

    def interrupt() -> None:
        runs = tmp_path / "a" / "runs"
        while not list(runs.glob("*/metrics.jsonl")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(DistillInterrupted) as stopped:
        sweep(_training(store, tmp_path / "a", scheduler=address))
    watcher.join()
    assert stopped.value.signum == signal.SIGINT
    assert list((tmp_path / "a" / "runs").glob("*/last.pt"))
    (gone_on,) = sweep(_training(store, tmp_path / "a"))["runs"]
    (unbroken,) = sweep(_training(store, tmp_path / "b", scheduler=address))["runs"]
    assert gone_on["val"]["mse"] == unbroken["val"]["mse"]
    assert not (tmp_path / "runs").exists()


def test_a_sweep_that_is_gone_leaves_no_run_in_the_next_ones_way(
    one_worker: LocalCluster, finished_world: Path, tmp_path: Path
) -> None:
    config = _training(finished_world / "store.zarr", tmp_path / "a")
    trials, settings = plan_trials(config, 4), VerifySettings.of(config)
    with connected_workers(one_worker.scheduler_address) as client:
        runner = ClusterRunner(client, trials, settings, {}, [].append)
        runner._submit()
        while not list((tmp_path / "a").glob("runs/*/metrics.jsonl")):
            time.sleep(0.05)
    with stopped_by_signals(StopFlag(), DistillInterrupted, "stopped"):
        deadline = time.monotonic() + 60
        while not list((tmp_path / "a").glob("runs/*/last.pt")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    # It stopped before its end: four steps, an epoch's validation and the result would have followed.
    assert not list((tmp_path / "a").glob("runs/*/student.safetensors"))


class HeldTask(FakeTask):
    """A run that a closing worker still holds when it begins elsewhere, and releases later."""

    def __call__(self, sweep: str, trial: Trial, settings: VerifySettings, known: Any) -> dict[str, Any]:
        outcome = super().__call__(sweep, trial, settings, known)
        tries = sum(name == trial.name for _, name, *_ in self.spans)
        if tries == 1:
            time.sleep(2 * self.seconds)
        if tries == 2:
            return outcome | {"status": "failed", "locked": True, "error": "is being trained by process 7"}
        return outcome


def test_a_run_that_the_worker_before_still_holds_waits_for_it(
    cluster: LocalCluster, fake: FakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    global task
    task = HeldTask(0.8)
    trials, settings = _plan(seed=(0, 1))
    leaving = threading.Timer(0.5, lambda: cluster.scale(1))
    leaving.start()
    outcomes = _run(cluster.scheduler_address, trials, settings)
    leaving.join()
    assert [outcome["status"] for outcome in outcomes] == ["done", "done"]
    assert len(task.spans) >= 3


def test_a_run_that_somebody_else_trains_is_a_failure(cluster: LocalCluster, fake: FakeTask) -> None:
    trials, settings = _plan(seed=(0,))
    with connected_workers(cluster.scheduler_address) as client:
        runner = ClusterRunner(client, trials, settings, {}, [].append)
        held = {"name": trials[0].name, "status": "failed", "locked": True, "error": "x"}
        assert list(runner._record([held])) == [held]
        runner.deaths[trials[0].name] = 1
        runner.locked[trials[0].name] = time.monotonic() - sweep_cluster.LOCK_WAIT_SECONDS - 1
        assert list(runner._record([held])) == [held]


def test_a_run_that_was_saved_as_its_worker_closes_goes_on_elsewhere(
    cluster: LocalCluster, fake: FakeTask
) -> None:
    trials, settings = _plan(seed=(0,))
    with connected_workers(cluster.scheduler_address) as client:
        runner = ClusterRunner(client, trials, settings, {}, [].append)
        runner.waiting.clear()
        saved = {"name": trials[0].name, "status": "interrupted", "error": "saved"}
        assert list(runner._record([saved])) == []
        assert runner.waiting == trials
        runner.waiting.clear()
        runner.stopping = True
        assert list(runner._record([saved])) == []
        assert runner.waiting == []


def test_a_worker_that_is_messages_to_close_has_its_run_save_and_stop(
    one_worker: LocalCluster, finished_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _training(finished_world / "store.zarr", tmp_path / "a")
    trials, settings = plan_trials(config, 4), VerifySettings.of(config)
    (worker,) = one_worker.workers.values()
    with connected_workers(one_worker.scheduler_address) as client:
        runner = ClusterRunner(client, trials, settings, {}, [].append)
        runner._submit()
        while not list((tmp_path / "a").glob("runs/*/metrics.jsonl")):
            time.sleep(0.05)
        (future,) = runner.running
        with monkeypatch.context() as patch:
            patch.setattr(worker, "_status", Status.closing_gracefully)
            outcome = future.result(timeout=60)
    assert outcome["status"] == "interrupted"
    assert list((tmp_path / "a").glob("runs/*/last.pt"))
