"""Summary of the fault log: counts and reasons to fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.fault_log import FaultLog, read_faults
from faults.summary import Summary, main


@pytest.fixture
def fault_log(tmp_path: Path) -> FaultLog:
    return FaultLog(tmp_path / "faults.jsonl", "test")


def note(fault_log: FaultLog, number: int, **changes: object) -> None:
    values = {"call": "write", "ordinal": number, "file": "shard", "phase": f"phase {number}", "fired": True}
    fault_log.record(**{**values, "lost": 0, "wrong": 0, "kill": True, **changes})


def test_faults_that_did_not_fire_do_not_count(fault_log: FaultLog) -> None:
    note(fault_log, 1)
    note(fault_log, 1, call="fsync")
    note(fault_log, 2, fired=False, lost=5)
    assert Summary.of(read_faults(fault_log.path)) == Summary(
        fired=2, silent=1, lost=0, wrong=0, pairs=2, kills=2
    )


@pytest.mark.parametrize(
    ("changes", "code"), [({}, 0), ({"lost": 1}, 1), ({"wrong": 1}, 1), ({"fired": False}, 1)]
)
def test_the_summary_fails_when_something_is_lost_or_wrong_or_nothing_fired(
    fault_log: FaultLog, capsys: pytest.CaptureFixture[str], changes: dict[str, object], code: int
) -> None:
    note(fault_log, 1, **changes)
    assert main([str(fault_log.path)]) == code
    lost, wrong = changes.get("lost", 0), changes.get("wrong", 0)
    fired = int(bool(changes.get("fired", True)))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{fired} faults fired, {lost} embeddings lost, {wrong} wrong reads"


def test_the_long_suite_needs_300_kills_and_100_pairs(fault_log: FaultLog) -> None:
    for number in range(299):
        note(fault_log, number, phase=f"phase {number % 99}")
    assert main([str(fault_log.path), "--full"]) == 1
    note(fault_log, 299, phase="phase 99")
    assert main([str(fault_log.path), "--full"]) == 0
