"""Settings that make runs of the suite alike: threads, before all other imports, hypothesis's examples, signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# xdist's processes share the cores. Where each has as many threads as the machine has cores, they wait for each
# other at every small step, spinning: three times the processor time, and more where the machine is busy. What the
# tests start inherits it.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _processes = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // _processes)))


def pytest_configure(config: pytest.Config) -> None:
    """The short suite tries the same examples every time, so that what fails is what was changed; the long one looks
    for new ones. Neither has a time limit for an example, which would test the machine."""
    short = "not long" in config.option.markexpr
    settings.register_profile("mobilesam", deadline=None, derandomize=short)
    settings.load_profile("mobilesam")


@pytest.fixture(autouse=True)
def _hangup_is_not_ignored() -> Iterator[None]:
    """SIGHUP as a terminal's programs have it, also where `nohup` runs the suite: what a test starts inherits it."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
