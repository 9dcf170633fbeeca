from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal
from mobilesam.distill import StopFlag
from mobilesam.distill.stop import stopped_by_signals
flag = StopFlag()
flag.saves = True
with stopped_by_signals(flag):
    os.kill(os.getpid(), signal.{first})
    print("asked", flag.signum, flush=True)
    {then}
    print("went on", flush=True)
"""


def ran(first: str, then: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(first=first, then=then)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_first_signal_asks_and_the_second_ends_the_process_at_once(name: str) -> None:
    done = ran(name, f"os.kill(os.getpid(), signal.{name})")
    assert done.stdout.split("\n")[0] == f"asked {int(getattr(signal, name))}"
    assert "went on" not in done.stdout
    assert done.returncode == -getattr(signal, name)


def test_one_signal_alone_lets_the_program_go_on() -> None:
    done = ran("SIGINT", "pass")
    assert "went on" in done.stdout
    assert done.returncode == 0
