"""Worker that outlives its coordinator: what it still writes does not damage the next coordinator's store."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from faults.fault_log import FaultLog
from faults.kills.cluster import FaultCluster
from faults.kills.fork_server import GUARD_SECONDS, Process
from faults.kills.scenarios import scenarios
from faults.recovery import Recovery, Snapshot, missing_rows, stray_files, wrong_reads

pytestmark = pytest.mark.fault


def stop_within_a_shard(cluster: FaultCluster, worker: Process, store: Path, stages: Path) -> None:
    """Stop (SIGSTOP) the worker while it has an unfinished shard open."""
    deadline = time.monotonic() + GUARD_SECONDS
    while True:
        os.kill(worker.pid, signal.SIGSTOP)
        lines = stages.read_text().splitlines() if stages.exists() else []
        # The second shard, since the first one may already be committed.
        if (
            lines.count("+begin") >= 2
            and lines.count("+begin") > lines.count("-finish")
            and lines[-1] == "+row"
        ):
            return
        os.kill(worker.pid, signal.SIGCONT)
        assert time.monotonic() < deadline, lines
        time.sleep(0.005)


@pytest.mark.parametrize("when", ["during", "after"])
def test_what_an_outliving_worker_writes_does_no_harm(
    cluster: FaultCluster, fault_log: FaultLog, when: str
) -> None:
    scenario = scenarios(cluster)["new"]()
    store = scenario.prepared()
    stages = store.with_name("worker-stages")
    worker = cluster.start_worker(stages, slow=0.1)
    coordinator = scenario.start(store)
    stop_within_a_shard(cluster, worker, store, stages)
    cluster.fork_server.kill(coordinator)
    assert cluster.fork_server.wait(coordinator) == -signal.SIGKILL
    # Another cluster, which the old worker is not part of.
    other = FaultCluster(cluster.fork_server, cluster.new_folder())
    if when == "during":
        other.start_worker(slow=0.1)
        os.kill(worker.pid, signal.SIGCONT)
    other.precompute(store, *scenario.options, photos=scenario.photos)
    os.kill(worker.pid, signal.SIGCONT)
    wait_until_finished(stages)
    read = wrong_reads(store, scenario.undisturbed), missing_rows(store, scenario.undisturbed)
    other.precompute(store, *scenario.options, photos=scenario.photos)
    outcome = Recovery(
        missing=read[1] + missing_rows(store, scenario.undisturbed),
        wrong=read[0] + wrong_reads(store, scenario.undisturbed),
        strays=stray_files(store, scenario.undisturbed),
    )
    other.close()
    cluster.kill_worker()
    fault_log.record(
        call="outlive",
        ordinal=0,
        file="partial",
        phase=f"row-{when}-the-next-writer",
        role="worker",
        fired=True,
        lost=len(outcome.missing),
        wrong=len(outcome.wrong),
    )
    assert outcome.clean, outcome
    assert Snapshot.of(store) == scenario.undisturbed


def wait_until_finished(stages: Path) -> None:
    """Wait until the worker has finished or failed every shard that it began."""
    deadline = time.monotonic() + GUARD_SECONDS
    while True:
        lines = stages.read_text().splitlines()
        if lines.count("+begin") == lines.count("-finish") + lines.count("!finish") + lines.count("!row"):
            return
        assert time.monotonic() < deadline, lines
        time.sleep(0.02)
