"""Stop on SIGINT, SIGTERM and SIGHUP: the first requests a stop that loses nothing, the second stops at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

from .errors import Interrupted
from .terminal import end_progress

logger = logging.getLogger(__name__)

_EXIT_SECONDS = 1.0
"""Time that a second signal gives Python to end the process; then it is ended in the middle of a step or a write."""


def _hangup() -> tuple[signal.Signals, ...]:
    """Return SIGHUP, sent when a terminal closes, unless it doesn't exist here or `nohup` has it ignored."""
    hangup = getattr(signal, "SIGHUP", None)
    return () if hangup is None or signal.getsignal(hangup) == signal.SIG_IGN else (hangup,)


class _StopNow(BaseException):
    """Immediate stop. No Exception, like KeyboardInterrupt: code that treats an Exception as a damaged file must not
    catch it.

    Args:
        signum: number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class StopFlag:
    """Request to stop, from a signal or from the program that drives the work.

    `signum` is the signal's number, None until a stop is requested. `graceful` is True while the work checks the flag
    and saves before it stops; while it is False, the first signal already stops at once. `kept` says what is saved so
    far, for the last line of a process that is killed.

    Args:
        second_kills: let the second signal end the process, even in the middle of a long step or write, after which
            Python would handle it. If False, the second signal unwinds the stack, so that worker processes and
            temporary files are cleaned up, and later signals are ignored.
        answer: line to print after the first signal, while the work goes on to a point where it can stop.
    """

    def __init__(
        self,
        *,
        second_kills: bool = True,
        answer: str = "stopping after this step and saving; interrupt again to stop at once without saving",
    ) -> None:
        self.signum: int | None = None
        self.graceful = False
        self.kept = ""
        self.answer = answer
        self.second_kills = second_kills
        self.watched = False
        """True while a watcher of signals prints the answer and the last line."""
        self.told = threading.Event()
        """Set once the watcher has printed the last line."""
        self._signalled = False
        self._stopping = False

    def set(self, signum: int = signal.SIGINT) -> None:
        """Request a stop."""
        self.signum = signum

    def on_signal(self, signum: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        # A stop requested by the program is no signal: the first signal after it still lets the work be saved.
        first, self._signalled = not self._signalled, True
        if not first and signum in _hangup():
            return  # a terminal that closes sends more than one, and its user can't have meant the second
        if not first and self.second_kills:
            self._die(signum)
        if self._stopping:
            return
        self.set(signum)
        if not (self.graceful and first):
            self._stopping = True
            raise _StopNow(signum)
        if not self.watched:
            self.reply()

    def reply(self) -> None:
        """Print the answer to the first signal."""
        logger.warning("%s", self.answer)

    def last_line(self, signum: int) -> None:
        """End the progress line, and say that the process is killed."""
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        end_progress()
        unsaved = " without saving" if self.graceful else ""
        logger.warning("killed by a second %s%s%s", name, unsaved, self.kept and f"; {self.kept}")

    def _die(self, signum: int) -> None:
        if self.watched:
            self.told.wait(_EXIT_SECONDS)
        else:
            self.last_line(signum)
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)


class _Watcher:
    """Thread that answers signals at once, while the main thread is in a step that may take minutes.

    Python calls its signal handlers between two bytecodes of the main thread; the number of each signal is written
    into a pipe at once (`signal.set_wakeup_fd`).

    Args:
        flag: flag whose lines are printed.
    """

    def __init__(self, flag: StopFlag) -> None:
        self._flag = flag
        self._numbers, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        flag.watched = True

    def close(self) -> None:
        """End the thread, and restore what was there before."""
        self._flag.watched = False
        signal.set_wakeup_fd(self._before)
        os.write(self._wakeup, b"\0")
        self._thread.join(_EXIT_SECONDS)
        os.close(self._wakeup)

    def _watch(self) -> None:
        first = True
        while True:
            (number,) = os.read(self._numbers, 1)
            if number == 0:
                os.close(self._numbers)
                return
            if number not in (signal.SIGINT, signal.SIGTERM, *_hangup()):
                continue
            if first:
                first = False
                if self._flag.graceful:
                    self._flag.reply()
            elif self._flag.second_kills and number not in _hangup():
                self._kill(number)

    def _kill(self, signum: int) -> None:
        # In a thread of its own: a terminal that is paused with Ctrl-S takes no line, and the process ends anyway.
        last = threading.Thread(target=self._flag.last_line, args=(signum,), daemon=True)
        last.start()
        last.join(_EXIT_SECONDS)
        self._flag.told.set()
        time.sleep(_EXIT_SECONDS)
        os._exit(128 + signum)


@contextmanager
def stopped_by_signals(flag: StopFlag, interrupted: type[Interrupted], message: str) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP set a flag in the context. A SIGHUP that is ignored (`nohup`) stays ignored.

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
    handled = (signal.SIGINT, signal.SIGTERM, *_hangup())
    before = {signum: signal.signal(signum, flag.on_signal) for signum in handled}
    watcher = _Watcher(flag)
    try:
        yield
    except _StopNow as stop:
        raise interrupted(message, stop.signum) from None
    finally:
        watcher.close()
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def starting_processes() -> Iterator[None]:
    """Block SIGINT and SIGHUP in worker processes started in the context.

    Ctrl-C and the end of a terminal reach the whole process group, but only the coordinator may act on them.
    Processes started in the context, and later by threads that began in it, inherit the blocked signals. A signal
    that comes during the context is delivered at its end.
    """
    came: list[int] = []
    blocked = (signal.SIGINT, *_hangup())
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {signum: signal.signal(signum, lambda number, _: came.append(number)) for signum in blocked}
    # If a thread of the context started the tracker later, that would unblock the signal in the thread.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for signum, handler in before.items():
            signal.signal(signum, handler)
    for number in dict.fromkeys(came):
        signal.raise_signal(number)
