"""Order of syncs: nothing is relied on before it is durable, by a model of what has been synced.

A kill cannot show this, since the kernel keeps what was written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from faults.kills.cluster import FaultCluster
from faults.kills.durability import DurabilityModel, merged
from faults.kills.scenarios import Scenario, scenarios
from faults.kills.strace import Tracer
from faults.kills.trace import read_trace
from faults.kills.training import Training, trainings

pytestmark = pytest.mark.fault


def violations(scenario: Scenario, worker_mutation: str | None = None) -> list[str]:
    """Return what a job, coordinator and worker together, relied on before it was durable."""
    cluster, store = scenario.cluster, scenario.prepared()
    before = [*store.parent.rglob("*")]
    stages, tracer = store.with_name("worker-stages"), Tracer(store.with_name("worker-log"))
    cluster.start_worker(stages, tracer, mutation=worker_mutation)
    coordinator_tracer = Tracer(store.with_name("log"))
    process = scenario.start(store, coordinator_tracer)
    assert cluster.fork_server.wait(process) == 0, process.printed()
    coordinator_tracer.end()
    cluster.kill_worker()
    tracer.end()
    events = merged(
        read_trace(tracer.log, stages).events,
        read_trace(coordinator_tracer.log, store.with_name("stages")).events,
    )
    return DurabilityModel(store, before).run(events).finished()


def violations_in_training(training: Training) -> list[str]:
    """Return what a trainer relied on before it was durable."""
    run = training.prepared()
    before = [*run.parent.rglob("*")]
    tracer = Tracer(run.with_name("log"))
    process = training.start(run, tracer)
    assert training.cluster.fork_server.wait(process) == 0, process.printed()
    tracer.end()
    return DurabilityModel(run, before).run(read_trace(tracer.log, run.with_name("stages")).events).finished()


@pytest.mark.parametrize("name", ["new", "new-int8", "extend", "retry", "resume"])
def test_shards_are_durable_before_they_are_listed_and_stores_before_they_are_seen(
    cluster: FaultCluster, name: str
) -> None:
    assert violations(scenarios(cluster)[name]()) == []


def test_a_run_is_durable_before_its_checkpoint_counts(cluster: FaultCluster, store: Path) -> None:
    assert violations_in_training(trainings(cluster, store)["new"]()) == []


def test_a_worker_that_does_not_sync_its_shards_is_noticed(cluster: FaultCluster) -> None:
    found = violations(scenarios(cluster)["new"](), worker_mutation="no_file_sync")
    shards = [line for line in found if "renamed into place before" in line and "embeddings/c." in line]
    assert len(shards) == 4, found


@pytest.mark.parametrize(
    ("mutation", "files"),
    [
        ("no_file_sync", ["embeddings/zarr.json", "sam_head.safetensors", "writer.json"]),
        (
            "no_folder_sync",
            ["c.0.0.0.0's folder", "embeddings/zarr.json's name", "store.zarr was not synced"],
        ),
    ],
)
def test_a_coordinator_that_does_not_sync_is_noticed(
    cluster: FaultCluster, mutation: str, files: list[str]
) -> None:
    found = violations(replace(scenarios(cluster)["new"](), mutation=mutation))
    for file in files:
        assert any(file in line for line in found), (file, found)


@pytest.mark.parametrize(
    ("mutation", "files"),
    [
        (
            "no_file_sync",
            ["last.pt was renamed", "student.safetensors was renamed", "config.json was renamed"],
        ),
        ("no_folder_sync", ["last.pt", "student.safetensors"]),
    ],
)
def test_a_trainer_that_does_not_sync_is_noticed(
    cluster: FaultCluster, store: Path, mutation: str, files: list[str]
) -> None:
    found = violations_in_training(replace(trainings(cluster, store)["new"](), mutation=mutation))
    for file in files:
        assert any(file in line for line in found), (file, found)
