"""Stopping by SIGINT and SIGTERM: the first signal asks for a stop that loses nothing, the second stops at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

from .errors import Interrupted

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _StopNow(BaseException):
    """Like KeyboardInterrupt, no Exception: code that takes Exceptions for a damaged file must not take this."""


class StopFlag:
    """Request to stop, from a signal or from the program that drives the work.

    `signum` is the signal's number, None until a stop is asked for. `graceful` is true while the work looks at the
    flag and saves before it stops; while it is false, the first signal already stops at once.

    Args:
        second_kills: leave the second signal to the kernel, which ends the process in the middle of a long step or
            write: Python would handle it only afterwards. Otherwise the second signal unwinds the stack, so that
            worker processes and temporary files are cleaned up, and later ones are ignored.
    """

    def __init__(self, *, second_kills: bool = True) -> None:
        self.signum: int | None = None
        self.graceful = False
        self._second_kills = second_kills
        self._signalled = False
        self._stopping = False

    def set(self, signum: int = signal.SIGINT) -> None:
        """Ask for a stop."""
        self.signum = signum

    def on_signal(self, signum: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        if self._stopping:
            return
        # A stop that the program asked for is no signal: the first one after it still lets the work be saved.
        first, self._signalled = not self._signalled, True
        self.set(signum)
        if self._second_kills:
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        if not (self.graceful and first):
            self._stopping = True
            raise _StopNow
        if self._second_kills:
            logger.warning("stopping after this step and saving; once more to stop at once, unsaved")


@contextmanager
def stopped_by_signals(flag: StopFlag, interrupted: type[Interrupted], message: str) -> Iterator[None]:
    """Let SIGINT and SIGTERM set `flag` in the context; do nothing outside the main thread, where Python has no
    handlers.

    Args:
        flag: asked to stop by the first signal.
        interrupted: exception to raise at the context's end after a signal that stopped at once.
        message: its message.

    Raises:
        Interrupted: of the type `interrupted`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, flag.on_signal) for signum in _SIGNALS}
    try:
        yield
    except _StopNow:
        assert flag.signum is not None
        raise interrupted(message, flag.signum) from None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def starting_processes() -> Iterator[None]:
    """Block SIGINT for worker processes started in the context: Ctrl-C reaches the whole process group, but the
    coordinator alone decides what it means.

    What is started in the context, now or later by threads that began in it, inherits SIGINT blocked. A SIGINT that
    comes during the context is delivered at its end.
    """
    came: list[int] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda signum, _: came.append(signum)) if in_main_thread else None
    # Were the tracker started by a thread of the context, it would let the signal through there again.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main_thread:
            signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)
