"""SIGINT and SIGTERM: the first asks the job to stop where nothing is lost, the second stops it at once; those after
it are not heard, so that workers and temporary files are cleaned up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

from .errors import PrecomputeInterrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _StopNow(BaseException):
    """Like KeyboardInterrupt, no Exception: whoever takes those for a damaged file must not take this."""


class StopRequest:
    """`signum` is the signal that came, None while none has. While `graceful`, the first is only noted."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.graceful = False
        self._stopping = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self._stopping:
            return
        noted = self.graceful and self.signum is None
        self.signum = signum
        if not noted:
            self._stopping = True
            raise _StopNow


@contextmanager
def starting_processes() -> Iterator[None]:
    """For starting workers: a Ctrl-C reaches the whole process group, but the coordinator alone decides what it
    means. What is started in the context, now or later by threads that began in it, inherits SIGINT blocked. One
    that comes meanwhile is heard when the context is left."""
    came: list[int] = []
    heard_here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda signum, _: came.append(signum)) if heard_here else None
    # Were it started by a thread of the context, it would let the signal through there again.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if heard_here:
            signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen for signals in the context (nothing is heard outside the main thread, where Python has none).

    One that stops at once becomes PrecomputeInterrupted at the context's end.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {signum: signal.signal(signum, request.handle) for signum in _SIGNALS}
    try:
        yield request
    except _StopNow:
        assert request.signum is not None
        raise PrecomputeInterrupted("interrupted; run the same command to go on", request.signum) from None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
