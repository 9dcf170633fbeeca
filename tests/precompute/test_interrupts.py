"""What a signal does at every stage of a run."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

import pytest

from mobilesam.common.signals import stop_request
from mobilesam.precompute import PrecomputeInterrupted


def _press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_signal_is_noted_while_graceful_and_the_second_stops_at_once() -> None:
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


def test_signals_after_the_one_that_stops_leave_the_cleaning_up_alone() -> None:
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


def test_a_signal_is_not_taken_for_what_is_being_done_going_wrong() -> None:
    def read() -> NoReturn:
        try:
            _press()
        except Exception as error:  # as code does that reads damaged files
            raise ValueError("damaged") from error
        raise AssertionError("not interrupted")

    with pytest.raises(PrecomputeInterrupted), stop_request():
        read()


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_request():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
