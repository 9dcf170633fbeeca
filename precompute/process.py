"""When a worker's process must end: with its coordinator, and when its teacher hangs."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TELLING_SECONDS = 1.0
"""For the last message to leave the process."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however that dies. Call it on the main thread.

    dask's workers watch their parent in a thread, which can't run while an image's decoder holds Python's lock.
    Linux only; elsewhere such a worker stays until it is killed by hand.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


@contextmanager
def ended_after(seconds: float, tell: Callable[[], None]) -> Iterator[None]:
    """Should the context last longer than `seconds`, `tell` and end the process: a thread that hangs in a library's
    code can't be stopped in any other way."""

    def end() -> None:
        tell()
        time.sleep(TELLING_SECONDS)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
