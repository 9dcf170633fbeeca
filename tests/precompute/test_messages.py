"""Spans of time that workers report."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from mobilesam.precompute.messages import Stopwatch


@pytest.mark.parametrize("years", [-20, 20])
def test_a_clock_that_is_set_in_the_middle_of_a_span_does_not_change_its_length(
    years: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, now = Stopwatch(), time.time()
    moved = SimpleNamespace(time=lambda: now + years * 365 * 86400, perf_counter=time.perf_counter)
    monkeypatch.setattr("mobilesam.precompute.messages.time", moved)
    span = watch.span("teacher")
    assert abs(span.start - now) < 10
    assert 0 <= span.stop - span.start < 10
