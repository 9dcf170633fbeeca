"""Mutations of the package: without a safeguard, the other tests' checks report a loss or a wrong read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from faults.damage.corruption import flip, swap
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
    """Fault log that is not part of the summary."""
    return FaultLog(tmp_path / "aside.jsonl", "aside")


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """Copy of the store that may be damaged."""
    copy_tree(store, tmp_path / "store.zarr")
    return tmp_path / "store.zarr"


def test_without_the_checksum_a_flipped_bit_is_reported_as_a_wrong_read(
    store: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = Snapshot.of(store)
    flip(copy / "embeddings" / "c.1.0.0.0", 100, bit=2)
    assert wrong_reads(copy, undisturbed) == []
    assert len(missing_rows(copy, undisturbed)) == 1
    no_checksum(monkeypatch.setattr)
    assert len(wrong_reads(copy, undisturbed)) == 1


def test_without_the_identity_check_swapped_shards_are_reported_as_wrong_reads(
    store: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = Snapshot.of(store)
    swap(copy / "embeddings" / "c.0.0.0.0", copy / "embeddings" / "c.1.0.0.0")
    assert wrong_reads(copy, undisturbed) == []
    assert len(missing_rows(copy, undisturbed)) == 4
    no_identity(monkeypatch.setattr)
    assert len(wrong_reads(copy, undisturbed)) == 4


def commits(scenario: Scenario) -> list[InjectionPoint]:
    """Return the points at which a coordinator renames each shard into place."""
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


def test_a_coordinator_that_syncs_no_folder_loses_committed_rows_in_a_power_cut(
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
