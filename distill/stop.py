"""A wish to stop, from a signal or from the program that drives the training."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import DistillInterrupted

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _StopNow(BaseException):
    """Like KeyboardInterrupt, no Exception: whoever takes those for a damaged file must not take this."""


class StopFlag:
    """Set once with the number of a signal; the trainer looks at it between steps.

    `saves` is true while there is something to save: before, a signal needn't wait for anybody to look.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.saves = False

    def set(self, signum: int = signal.SIGINT) -> None:
        """Asks the trainer to save and stop."""
        self.signum = signum

    def on_signal(self, signum: int, _frame: FrameType | None) -> None:
        """The first signal asks; the second one ends the process as if nobody had listened.

        The second is left to the kernel: Python would hear it only after the step or the write it is in.
        """
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self.set(signum)
        if not self.saves:
            raise _StopNow
        logger.warning("stopping after this step and saving; once more to stop at once, unsaved")


@contextmanager
def stopped_by_signals(flag: StopFlag) -> Iterator[None]:
    """Lets SIGINT and SIGTERM set the flag while the block runs; does nothing outside the main thread, where
    Python allows no handlers. One that stops at once becomes DistillInterrupted at the block's end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, flag.on_signal) for signum in _SIGNALS}
    try:
        yield
    except _StopNow:
        assert flag.signum is not None
        raise DistillInterrupted(
            "stopped before training went on, so that nothing was lost; run the same command again",
            flag.signum,
        ) from None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
