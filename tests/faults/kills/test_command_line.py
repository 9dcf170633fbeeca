"""kill -9 in the process tree of the real command line, with nannies and workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.fault_log import FaultLog
from faults.kills.cluster import draw_pictures
from faults.kills.training import RunContents, first_difference
from faults.recovery import Snapshot, listed_keys, processes_with_environment, rerun_and_compare

pytestmark = pytest.mark.fault

GUARD_SECONDS = 300.0

# dask runs a preload more than once in a process: the import gets the unwrapped function every time.
SLOW_IMAGES = """
import time
import mobilesam.precompute.decode as decode
from mobilesam.sam import load_image
def slowly(*arguments):
    time.sleep(0.3)
    return load_image(*arguments)
decode.load_image = slowly
"""


class Command:
    """`python -m mobilesam ...` in a session of its own; all its processes have `mark` in their environment."""

    def __init__(self, folder: Path, *arguments: str, slow: bool = False) -> None:
        self.mark = uuid.uuid4().hex
        (folder / "tmp").mkdir(exist_ok=True)
        environment = {**os.environ, "FAULT_MARK": self.mark, "TMPDIR": str(folder / "tmp")}
        if slow:
            (folder / "preload.py").write_text(SLOW_IMAGES)
            environment["DASK_DISTRIBUTED__WORKER__PRELOAD"] = str(folder / "preload.py")
        self._output = (folder / "output").open("w+b")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mobilesam", *arguments],
            cwd=folder,
            env=environment,
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,
        )

    def wait(self) -> int:
        """Wait for the end, close the output file and return the exit code."""
        code = self.process.wait(timeout=GUARD_SECONDS)
        self._output.close()
        return code

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait until `reached` returns True; assert that the command still runs."""
        deadline = time.monotonic() + GUARD_SECONDS
        while not reached():
            assert self.process.poll() is None, Path(self._output.name).read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def worker(self) -> int:
        """Return the id of the worker process that dask's nanny has started."""
        found = [
            pid
            for pid in processes_with_environment(self.mark)
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(found) == 1, found
        return found[0]

    def survivors(self) -> list[int]:
        """Wait until all processes of the command have ended; return those that have not after GUARD_SECONDS."""
        deadline = time.monotonic() + GUARD_SECONDS
        while (found := processes_with_environment(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found


def precompute(folder: Path, *, slow: bool = False) -> Command:
    options = ("--teacher", "vit_nano", "--image-size", "64", "--shard-size", "2", "--json")
    return Command(
        folder,
        "precompute",
        "--images",
        str(folder.parent / "photos"),
        "--out",
        "store.zarr",
        *options,
        slow=slow,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with photos, and with the results of an undisturbed run in `whole`."""
    folder = tmp_path_factory.mktemp("commands")
    draw_pictures(folder / "photos")
    (folder / "whole").mkdir()
    assert precompute(folder / "whole").wait() == 0
    return folder


@pytest.fixture
def place(folder: Path, request: pytest.FixtureRequest) -> Path:
    """New folder for one test, beside the photos."""
    place = folder / request.node.name[:60]
    place.mkdir()
    return place


def test_workers_and_nannies_end_when_their_coordinator_is_killed(
    folder: Path, place: Path, fault_log: FaultLog
) -> None:
    command = precompute(place, slow=True)
    command.until(lambda: len(listed_keys(place / "store.zarr")) >= 2)
    promised = listed_keys(place / "store.zarr")
    command.process.kill()
    assert command.wait() == -signal.SIGKILL
    assert command.survivors() == []

    def rerun() -> None:
        assert precompute(place).wait() == 0

    outcome = rerun_and_compare(
        place / "store.zarr", Snapshot.of(folder / "whole" / "store.zarr"), rerun, promised=promised
    )
    note(fault_log, "coordinator", len(outcome.missing), len(outcome.wrong))
    assert outcome.clean, outcome
    assert names(place / "tmp") == names(folder / "whole" / "tmp"), "scratch files are left"


def test_a_nanny_replaces_a_worker_that_was_killed_and_the_job_continues(
    folder: Path, place: Path, fault_log: FaultLog
) -> None:
    command = precompute(place, slow=True)
    command.until(lambda: len(listed_keys(place / "store.zarr")) >= 2)
    first = command.worker()
    os.kill(first, signal.SIGKILL)
    assert command.wait() == 0
    assert command.survivors() == []
    outcome = rerun_and_compare(
        place / "store.zarr", Snapshot.of(folder / "whole" / "store.zarr"), lambda: None
    )
    note(fault_log, "worker", len(outcome.missing), len(outcome.wrong))
    assert outcome.clean, outcome


def test_a_killed_trainer_resumes_from_its_checkpoint(folder: Path, place: Path, fault_log: FaultLog) -> None:
    arguments = ("--store", str(folder / "whole" / "store.zarr"), "--epochs", "2", "--batch-size", "2")
    options = ("--precision", "float32", "--val-fraction", "0.2", "--out", "run", "--json")
    (place / "whole").mkdir()
    (place / "killed").mkdir()
    assert Command(place / "whole", "distill", *arguments, *options).wait() == 0
    command = Command(place / "killed", "distill", *arguments, *options)
    checkpoint = place / "killed" / "run" / "last.pt"
    command.until(checkpoint.exists)
    command.process.kill()
    assert command.wait() == -signal.SIGKILL
    assert command.survivors() == []
    assert Command(place / "killed", "distill", *arguments, *options).wait() == 0
    undisturbed, outcome = RunContents.of(place / "whole" / "run"), RunContents.of(place / "killed" / "run")
    same = (outcome.lines, outcome.weights) == (undisturbed.lines, undisturbed.weights)
    note(fault_log, "trainer", 0, 0 if same else 1)
    assert same, first_difference(outcome.lines, undisturbed.lines)
    assert outcome.files == undisturbed.files


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def note(fault_log: FaultLog, role: str, lost: int, wrong: int) -> None:
    fault_log.record(
        call="time",
        ordinal=0,
        file="",
        phase=f"command-{role}",
        role=role,
        fired=True,
        lost=lost,
        wrong=wrong,
        kill=True,
    )
