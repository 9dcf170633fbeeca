"""SIGINT and SIGTERM in both modes of a stop flag: the second signal unwinds the stack, or kills the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import NoReturn

import pytest

from mobilesam.common.errors import PrecomputeInterrupted
from mobilesam.common.signals import StopFlag, starting_processes, stopped_by_signals


@contextmanager
def stop_request() -> Iterator[StopFlag]:
    """Yield a flag whose second signal unwinds the stack, as in precompute."""
    stop = StopFlag(second_kills=False)
    with stopped_by_signals(stop, PrecomputeInterrupted, "run the same command to resume"):
        yield stop


def _press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_while_graceful_the_first_signal_sets_the_flag_and_the_second_unwinds_the_stack() -> None:
    reached: list[object] = []

    def press_twice() -> None:
        with stop_request() as stop:
            stop.graceful = True
            _press()
            reached.append(stop.signum)
            _press()
            reached.append("not this")

    with pytest.raises(PrecomputeInterrupted, match="run the same command") as caught:
        press_twice()
    assert reached == [signal.SIGINT]
    assert caught.value.signum == signal.SIGINT


def test_the_first_signal_after_a_stop_asked_for_by_the_program_is_still_graceful() -> None:
    with stop_request() as stop:
        stop.graceful = True
        stop.set(signal.SIGTERM)
        _press()
        assert stop.signum == signal.SIGINT


def test_signals_after_the_one_that_stops_are_ignored_during_clean_up() -> None:
    cleaned = []

    def stop_and_clean_up() -> None:
        with stop_request():
            try:
                _press()
            finally:
                _press()
                cleaned.append(True)

    with pytest.raises(PrecomputeInterrupted):
        stop_and_clean_up()
    assert cleaned == [True]


def test_a_signal_is_not_caught_as_an_error_of_the_interrupted_code() -> None:
    def read() -> NoReturn:
        try:
            _press()
        except Exception as error:  # as code does that reads damaged files
            raise ValueError("damaged") from error
        raise AssertionError("not interrupted")

    with pytest.raises(PrecomputeInterrupted), stop_request():
        read()


def test_signal_handlers_are_restored_after_the_context() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_request():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


KILLED_BY_THE_SECOND = """
import os, signal, time
from mobilesam.common.errors import DistillInterrupted
from mobilesam.common.signals import StopFlag, stopped_by_signals
flag = StopFlag()
flag.graceful = True
with stopped_by_signals(flag, DistillInterrupted, "stopped"):
    os.kill(os.getpid(), signal.{first})
    print("asked", flag.signum, flush=True)
    {then}
    print("went on", flush=True)
"""


def ran(first: str, then: str) -> subprocess.CompletedProcess[str]:
    program = KILLED_BY_THE_SECOND.format(first=first, then=then)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_first_signal_sets_the_flag_and_the_second_kills_the_process(name: str) -> None:
    done = ran(name, f"os.kill(os.getpid(), signal.{name})")
    assert done.stdout.split("\n")[0] == f"asked {int(getattr(signal, name))}"
    assert "went on" not in done.stdout
    assert done.returncode == -getattr(signal, name)


def test_the_second_ends_the_process_in_the_middle_of_a_step_that_python_can_not_interrupt() -> None:
    done = ran(
        "SIGTERM",
        "import hashlib, threading; "
        "threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start(); "
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
    )
    assert "went on" not in done.stdout
    assert done.returncode == 130
    assert "killed by a second Ctrl-C without saving" in done.stderr


def test_a_terminal_that_closes_sends_many_signals_and_the_work_is_still_saved() -> None:
    done = ran(
        "SIGHUP", "os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.5); os.kill(os.getpid(), signal.SIGHUP)"
    )
    assert done.stdout.split("\n")[0] == f"asked {int(signal.SIGHUP)}"
    assert "went on" in done.stdout


def test_under_nohup_a_closed_terminal_is_ignored() -> None:
    program = KILLED_BY_THE_SECOND.format(first="SIGHUP", then="pass")
    done = subprocess.run(
        ["nohup", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout == "asked None\nwent on\n"


def test_one_signal_alone_does_not_end_the_program() -> None:
    done = ran("SIGINT", "pass")
    assert "went on" in done.stdout
    assert done.returncode == 0


def test_ctrl_c_while_processes_start_is_delivered_afterwards_and_never_to_them() -> None:
    heard: list[int] = []
    masks: list[str] = []

    def start_child() -> None:
        masks.append(subprocess.check_output(["grep", "SigBlk", "/proc/self/status"], text=True))

    before = signal.signal(signal.SIGINT, lambda signum, _: heard.append(signum))
    try:
        with starting_processes():
            thread = Thread(target=start_child)
            thread.start()
            thread.join()
            os.kill(os.getpid(), signal.SIGINT)
            assert heard == []
        assert heard == [signal.SIGINT]
        start_child()
    finally:
        signal.signal(signal.SIGINT, before)
    bit = 1 << signal.SIGINT - 1
    assert [bool(int(mask.split()[1], 16) & bit) for mask in masks] == [True, False]
