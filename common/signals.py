"""Stop on SIGINT and SIGTERM: the first signal requests a stop that loses nothing, the second stops at once."""

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
    """Immediate stop. No Exception, like KeyboardInterrupt: code that treats an Exception as a damaged file must not
    catch it."""


class StopFlag:
    """Request to stop, from a signal or from the program that drives the work.

    `signum` is the signal's number, None until a stop is requested. `graceful` is True while the work checks the flag
    and saves before it stops; while it is False, the first signal already stops at once.

    Args:
        second_kills: leave the second signal to the kernel, which ends the process even in the middle of a long step
            or write, after which Python would handle it. If False, the second signal unwinds the stack, so that
            worker processes and temporary files are cleaned up, and later signals are ignored.
    """

    def __init__(self, *, second_kills: bool = True) -> None:
        self.signum: int | None = None
        self.graceful = False
        self._second_kills = second_kills
        self._signalled = False
        self._stopping = False

    def set(self, signum: int = signal.SIGINT) -> None:
        """Request a stop."""
        self.signum = signum

    def on_signal(self, signum: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        if self._stopping:
            return
        # A stop requested by the program is no signal: the first signal after it still lets the work be saved.
        first, self._signalled = not self._signalled, True
        self.set(signum)
        if self._second_kills:
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        if not (self.graceful and first):
            self._stopping = True
            raise _StopNow
        if self._second_kills:
            logger.warning(
                "stopping after this step and saving; interrupt again to stop at once without saving"
            )


@contextmanager
def stopped_by_signals(flag: StopFlag, interrupted: type[Interrupted], message: str) -> Iterator[None]:
    """Let SIGINT and SIGTERM set a flag in the context.

    Outside the main thread, where Python handles no signals, the context does nothing.

    Args:
        flag: flag that signals set.
        interrupted: type of the error to raise after a signal that stopped at once.
        message: message of the error.

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
    """Block SIGINT in worker processes started in the context.

    Ctrl-C reaches the whole process group, but only the coordinator may act on it. Processes started in the context,
    and later by threads that began in it, inherit the blocked SIGINT. A SIGINT that comes during the context is
    delivered at its end.
    """
    came: list[int] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda signum, _: came.append(signum)) if in_main_thread else None
    # If a thread of the context started the tracker later, that would unblock the signal in the thread.
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
