"""SIGINT and SIGTERM in every phase of `mobilesam distill`, the real command line in its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mobilesam.distill import Run

pytestmark = pytest.mark.long  # two processes a test, which import everything

# The command with a small student; it sends itself signals at a chosen call of a function, with FUNCTION>FILE of
# those whose last argument is that file.
PROGRAM = """
import importlib, os, sys
from torch import nn
from mobilesam.cli import main
from mobilesam.distill.students.registry import STUDENTS, StudentInfo

def build(*sizes):
    return nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 256, 1))

STUDENTS["tiny_vit"] = StudentInfo(name="tiny_vit", summary="", build=build, training_bytes={"float32": 1})
module, name, call, signum, count = sys.argv[1:6]
name, _, file = name.partition(">")
if name:
    holder = importlib.import_module("mobilesam.distill." + module)
    for part in name.split(".")[:-1]:
        holder = getattr(holder, part)
    name = name.split(".")[-1]
    function, calls = getattr(holder, name), [0]

    def watched(*arguments, **options):
        calls[0] += not file or os.path.basename(arguments[-1]) == file
        if calls[0] == int(call):
            calls[0] = -1000
            for _ in range(int(count)):
                os.kill(os.getpid(), int(signum))
                sum(range(1000))  # lets Python hear it
        return function(*arguments, **options)

    setattr(holder, name, watched)
sys.argv[1:] = sys.argv[6:]
main()
"""


def ran(
    store: Path, module: str = "", name: str = "", call: int = 0, signum: int = 0, count: int = 0
) -> tuple[int, str]:
    command = ["distill", "--store", str(store), "--out", "run", "--epochs", "2", "--batch-size", "2"]
    how = [module, name, str(call), str(int(signum)), str(count)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *how, *command, "--device", "cpu", "--precision", "float32"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


def losses(run: Path) -> list[object]:
    clocks = ("images_per_second", "data_wait_share", "seconds", "finished", "run")
    return [{k: v for k, v in line.items() if k not in clocks} for line in Run.open(run).history()]


@pytest.fixture(scope="module")
def wanted(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The lines of a run that nobody disturbed."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("undisturbed"))
    try:
        code, said = ran(store)
        assert code == 0, said
        return losses(Path("run"))
    finally:
        os.chdir(before)


BEFORE = "nothing was lost"
FIRST = [
    pytest.param("run", "split_rows", 1, BEFORE, id="the store is loaded"),
    pytest.param("run_folder", "write_checksummed", 2, BEFORE, id="the folder is made"),
    pytest.param("run", "build_student", 1, BEFORE, id="the student is built"),
    pytest.param("trainer", "embed", 2, "after step 2 of 6", id="training"),
    pytest.param("metrics.evaluate", "evaluate_batches", 1, "after step 3 of 6", id="validation"),
    pytest.param("checkpoint", "write_atomic", 1, "after step 4 of 6", id="saving"),
    pytest.param("metrics.evaluate", "evaluate_batches", 3, "after step 6 of 6", id="the last evaluation"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "call", "said"), FIRST)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_saves_and_the_exit_code_has_its_number(
    store: Path, wanted: list[object], module: str, name: str, call: int, said: str, signum: signal.Signals
) -> None:
    code, output = ran(store, module, name, call, signum, 1)
    assert code == 128 + signum, output
    assert said in output
    code, output = ran(store)
    assert code == 0, output
    assert losses(Path("run")) == wanted
    assert not list(Path("run").glob("*.partial"))


SECOND = [
    pytest.param("trainer", "embed", 5, id="training"),
    pytest.param("metrics.evaluate", "evaluate_batches", 2, id="validation"),
    pytest.param("checkpoint", "write_atomic", 2, id="writing the second checkpoint"),
    # The second checkpoint is the first that finds an older one, last.pt, and renames it to previous.pt.
    pytest.param("checkpoint", "os.rename>previous.pt", 1, id="before its first rename"),
    pytest.param("checkpoint", "os.rename>last.pt", 2, id="between its renames"),
]


@pytest.mark.parametrize(("module", "name", "call"), SECOND)
def test_the_second_signal_ends_the_process_at_once_and_nothing_is_damaged(
    store: Path, wanted: list[object], module: str, name: str, call: int
) -> None:
    code, _ = ran(store, module, name, call, signal.SIGINT, 2)
    assert code == -signal.SIGINT
    if "rename" in name:
        assert Path("run/last.pt").exists() == name.endswith("previous.pt")
    code, output = ran(store)
    assert code == 0, output
    assert losses(Path("run")) == wanted
    assert json.loads((Path("run") / "metrics.jsonl").read_text().splitlines()[-1])["kind"] == "result"
    assert not list(Path("run").glob("*.partial"))
