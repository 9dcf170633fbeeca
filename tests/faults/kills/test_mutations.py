"""The suite is worth something: without a safeguard of the package, the checks that the other tests use report it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from faults.fault_log import FaultLog
from faults.kills.cluster import FaultCluster, copy_tree
from faults.kills.inject import inject_into_coordinator, trace_coordinator
from faults.kills.injection_points import InjectionPoint, injection_points
from faults.kills.mutations import no_checksum, no_identity
from faults.kills.scenarios import Scenario, scenarios
from faults.kills.strace import RENAMES
from faults.kills.training import inject_into_trainer, trace_trainer, trainings
from faults.recovery import Snapshot, missing_rows, wrong_reads

pytestmark = pytest.mark.fault


@pytest.fixture
def aside(tmp_path: Path) -> FaultLog:
    """A fault_log that doesn't count."""
    return FaultLog(tmp_path / "aside.jsonl", "aside")


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A store that may be damaged."""
    copy_tree(store, tmp_path / "store.zarr")
    return tmp_path / "store.zarr"


def flip(path: Path) -> None:
    """One bit of the first row's bytes."""
    data = bytearray((path / "embeddings" / "c.1.0.0.0").read_bytes())
    data[100] ^= 4
    (path / "embeddings" / "c.1.0.0.0").write_bytes(data)


def swap(path: Path) -> None:
    """Two shards, each whole, change places."""
    one, other = path / "embeddings" / "c.0.0.0.0", path / "embeddings" / "c.1.0.0.0"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def test_without_the_checksum_a_flipped_bit_is_reported_as_a_wrong_read(
    store: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = Snapshot.of(store)
    flip(copy)
    assert wrong_reads(copy, undisturbed) == []
    assert len(missing_rows(copy, undisturbed)) == 1
    no_checksum(monkeypatch.setattr)
    assert len(wrong_reads(copy, undisturbed)) == 1


def test_without_the_identity_swapped_shards_are_reported_as_wrong_reads(
    store: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = Snapshot.of(store)
    swap(copy)
    assert wrong_reads(copy, undisturbed) == []
    assert len(missing_rows(copy, undisturbed)) == 4
    no_identity(monkeypatch.setattr)
    assert len(wrong_reads(copy, undisturbed)) == 4


def commits(scenario: Scenario) -> list[InjectionPoint]:
    """Where a coordinator is about to put each shard in its place."""
    trace, store = trace_coordinator(scenario)
    everything = injection_points(trace, store, "coordinator", calls=RENAMES)
    return [point for point in everything if point.phase == "commit-shard"]


def test_a_shard_that_is_listed_before_it_is_in_its_place_is_reported_as_lost(
    cluster: FaultCluster, aside: FaultLog
) -> None:
    scenario = replace(scenarios(cluster)["new"](), mutation="listed_first")
    result = inject_into_coordinator(scenario, commits(scenario)[1], aside)
    assert result.fired
    assert any("missing: ['" in line for line in result.complaints), result


def test_a_coordinator_that_syncs_no_folder_loses_what_it_promised_in_a_power_cut(
    cluster: FaultCluster, aside: FaultLog
) -> None:
    scenario = replace(scenarios(cluster)["new"](), mutation="no_folder_sync")
    result = inject_into_coordinator(scenario, commits(scenario)[1], aside)
    assert result.fired
    assert any("after a power cut: missing ['" in line for line in result.complaints), result


def test_a_checkpoint_that_is_written_in_place_is_reported(
    cluster: FaultCluster, store: Path, aside: FaultLog
) -> None:
    training = replace(trainings(cluster, store)["new"](), mutation="written_in_place")
    trace, run = trace_trainer(training)
    halves = [event for event in trace.events if event.call == "write" and event.path == str(run / "last.pt")]
    with pytest.raises(AssertionError, match=r"distill ended with 3:\n(.*\n)*.*last\.pt .*damaged"):
        inject_into_trainer(training, InjectionPoint.at(halves[5]), aside)
