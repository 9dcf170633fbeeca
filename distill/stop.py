"""A wish to stop, from a signal or from the program that drives the training."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


class StopFlag:
    """Set once with the number of a signal; the trainer looks at it between steps."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def set(self, signum: int = signal.SIGINT) -> None:
        """Asks the trainer to save and stop."""
        self.signum = signum

    def on_signal(self, signum: int, _frame: FrameType | None) -> None:
        """The first signal asks; the second one ends the process as if nobody had listened."""
        if self.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        self.set(signum)
        logger.warning("stopping after this step and saving; once more to stop at once, unsaved")


@contextmanager
def stopped_by_signals(flag: StopFlag) -> Iterator[None]:
    """Lets SIGINT and SIGTERM set the flag while the block runs; does nothing outside the main thread, where
    Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, flag.on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
