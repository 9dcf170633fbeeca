"""Messages, progress and results on the terminal, and what happens when the terminal goes away.

Standard error carries everything meant for people, standard output the result. While `guarded_streams` is active, no
line that can't be written ends the work: it is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

import click

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live


class SafeStream:
    """Text stream whose lines are dropped if they can't be written: the reader is gone, the disk is full.

    Args:
        stream: stream to write to; None for one that was closed when the process began.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.failure: OSError | None = None if stream is not None else OSError(errno.EBADF, "it is closed")
        """First error of a write."""
        # Never closed: later writers may still hold this stream.
        self._stream = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115

    def write(self, text: str) -> int:
        """Write text as far as possible."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            plain = text.encode(self._stream.encoding or "ascii", "backslashreplace")
            return self.write(plain.decode(self._stream.encoding or "ascii"))
        except (OSError, ValueError) as error:
            self._drop(error)
            return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write several pieces of text."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is buffered as far as possible."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError | ValueError) -> None:
        """Empty the stream's buffer: a later write, and the interpreter at its end, would fail at the same bytes."""
        if self.failure is None:
            self.failure = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
        with contextlib.suppress(
            OSError, ValueError
        ):  # a stream without descriptor, or a closed one, keeps none
            descriptor = self._stream.fileno()
            saved, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, descriptor)
                self._stream.flush()
            finally:
                os.dup2(saved, descriptor)
                os.close(saved)
                os.close(nowhere)


@contextlib.contextmanager
def guarded_streams() -> Iterator[SafeStream]:
    """Replace standard output and standard error by streams that never raise, and yield that of standard output."""
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    output, errors = SafeStream(sys.stdout), SafeStream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
    try:
        yield output
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before


def _open_closed_descriptors() -> None:
    """Open /dev/null at each standard descriptor that is closed (`2>&-`), lest the next file that is opened gets that
    number, and with it the messages of libraries."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


class TrainingProgress(Protocol):
    """Progress of a training, counted in optimiser steps; `distill.Progress` has these fields."""

    @property
    def step(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def phase(self) -> str: ...
    @property
    def loss(self) -> float | None: ...
    @property
    def images_per_second(self) -> float: ...
    @property
    def eta_seconds(self) -> float: ...
    @property
    def evaluated(self) -> int: ...
    @property
    def to_evaluate(self) -> int: ...


class EmbeddingProgress(Protocol):
    """Progress of a precompute run, counted in images; `precompute.Snapshot` has these fields."""

    @property
    def images(self) -> int: ...
    @property
    def done_before(self) -> int: ...
    @property
    def computed(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def images_per_second(self) -> float | None: ...
    @property
    def eta(self) -> float | None: ...


@dataclass(frozen=True)
class _Status:
    """State of the work as shown: a count, or a phase whose length isn't known."""

    text: str
    """Name of the phase, or the unit of the count."""
    done: float = 0
    total: float | None = None
    details: tuple[str, ...] = ()
    """Parts after the count, the most important first: on a narrow terminal the last ones are left out."""
    quiet: float = 0.0
    """Seconds after which a phase is worth a line, where no line can be drawn again."""
    began: float = field(default_factory=time.monotonic)

    def parts(self) -> list[str]:
        if self.total is None:
            return [self.text, *self.details, f"{_time(time.monotonic() - self.began)} so far"]
        return [f"{self.done:,.0f}/{self.total:,.0f} {self.text}", *self.details]

    def line(self) -> str:
        return ", ".join(self.parts())


class Reporter:
    """Messages and progress on standard error.

    On a terminal the progress is one line that is drawn again and again, fitted to the terminal's width. Elsewhere (a
    pipe, a file, TERM=dumb) it is a line every `LINE_SECONDS`.

    Args:
        title: name of the command, in front of the progress.
    """

    LINE_SECONDS = 10.0
    QUIET_SECONDS = 2.0
    """Time after which a phase is worth a line of its own where no line can be drawn again."""

    def __init__(self, title: str) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._title = title
        # FORCE_COLOR and the like make rich take a pipe for a terminal.
        self._redraws = self._console.is_interactive and bool(sys.stderr.isatty())
        self._live: Live | None = None
        self._lock = threading.RLock()
        self._status: _Status | None = None
        self._last_time, self._last_shown = time.monotonic(), (-1.0, -1.0)
        self._phase_told = self._closed = False
        self._ended = threading.Event()
        self._ticker: threading.Thread | None = None

    def __enter__(self) -> Reporter:
        _active.append(self)
        self._begin(_Status("starting", quiet=self.LINE_SECONDS))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        _active.remove(self)

    def close(self) -> None:
        """End the progress line, and show the cursor again."""
        self._closed = True
        self._ended.set()
        if self._live is not None:
            self._live.stop()

    def message(self, text: str) -> None:
        """Print one line, or a few, above the progress."""
        from rich.text import Text

        if self._live is None or not self._live.is_started:
            _return_to_line_start()
        self._console.print(Text(text), soft_wrap=True)

    def show(self, done: float, total: float, unit: str, *details: str) -> None:
        """Show how far the work is.

        Args:
            done: units done so far.
            total: units in all.
            unit: what is counted.
            details: text after the count, such as the time left and the rate, the most important first.
        """
        self._set(_Status(unit, done, total, details))
        if self._redraws:
            return
        news = (done, total) != self._last_shown
        if time.monotonic() - self._last_time >= self.LINE_SECONDS or (done == total and news):
            self._last_shown = (done, total)
            self._print_status()

    def phase(self, text: str, *details: str) -> None:
        """Show that work has begun whose length isn't known, and how long it takes so far.

        Args:
            text: the work.
            details: more about it, the most important first.
        """
        self._begin(_Status(text, details=details, quiet=self.QUIET_SECONDS))

    def _begin(self, phase: _Status) -> None:
        self._set(phase)
        if self._ticker is None and not self._redraws:
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()

    def step(self, number: int, count: int, text: str) -> None:
        """Show which of several steps, of unknown lengths, has begun."""
        self.phase(text, f"step {number} of {count}")

    def download(self, done: int, total: int) -> None:
        """Show how many of a checkpoint's bytes are downloaded."""
        self.show(done, total, "bytes downloaded")

    def points(self, done: int, total: int) -> None:
        """Show at how many points of a grid masks are predicted."""
        self.show(done, total, "points")

    def comparison(self, done: int, total: int) -> None:
        """Show how many images are compared."""
        self.show(done, total, "images")

    def drawing(self, done: int, total: int) -> None:
        """Show how many photos are drawn for a report."""
        self.show(done, total, "photos drawn")

    def training(self, progress: TrainingProgress) -> None:
        """Show the progress of a distillation, in steps, and of its evaluations, in images."""
        loss = [] if progress.loss is None else [f"loss {progress.loss:.4g}"]
        place = [f"epoch {progress.epoch} of {progress.epochs}", progress.phase]
        if progress.to_evaluate:
            images = f"{progress.evaluated:,}/{progress.to_evaluate:,} images"
            place = [f"{progress.phase} {images}", place[0]]
        self.show(
            progress.step,
            progress.steps,
            "steps",
            f"{_time(progress.eta_seconds)} left",
            *place,
            *loss,
            f"{progress.images_per_second:.3g} images/s",
        )

    def progress(self, snapshot: EmbeddingProgress) -> None:
        """Show the progress of a precompute job, in images."""
        rate = snapshot.images_per_second
        speed = [] if rate is None else [f"{_time(snapshot.eta or 0)} left", f"{rate:.3g} images/s"]
        counts = [f"{snapshot.failed:,} failed", f"{snapshot.done_before:,} done before"]
        self.show(snapshot.computed, snapshot.images, "images", *speed, *counts)

    def _set(self, status: _Status) -> None:
        with self._lock:
            self._status, self._phase_told = status, False
            if self._closed or not self._redraws:
                return
            if self._live is None:
                from rich.live import Live

                self._live = Live(
                    get_renderable=self._render,
                    console=self._console,
                    redirect_stdout=False,
                    vertical_overflow="crop",
                )
                self._live.start()
                # rich hides the cursor. Whoever kills or stops the process (Ctrl-Z) would be left without one.
                self._console.show_cursor(True)

    def _render(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        status = self._status
        assert status is not None
        text, title, bar = fit(status.parts(), self._title, self._console.width - 1, status.total is not None)
        line = Table.grid(padding=(0, 1))
        cells: list[RenderableType] = [Text(title)] if title else []
        if bar:
            cells.append(ProgressBar(status.total or 1, min(status.done, status.total or 1), width=bar))
        line.add_row(*cells, Text(text, no_wrap=True, overflow="ellipsis"))
        return line

    def _tick(self) -> None:
        """Print a phase that lasts, and later that it still does."""
        while not self._ended.wait(TICK_SECONDS):
            with self._lock:
                status, now = self._status, time.monotonic()
                if status is None or status.total is not None or now - status.began < status.quiet:
                    continue
                if not self._phase_told or now - self._last_time >= self.LINE_SECONDS:
                    self._phase_told = True
                    self._print_status()

    def _print_status(self) -> None:
        assert self._status is not None
        self._last_time = time.monotonic()
        self.message(self._status.line())


TICK_SECONDS = 0.2
"""Interval at which it is checked whether a phase lasts."""

BAR_WIDTHS = (10, 40)
"""Columns of the shortest and the longest bar."""


def fit(parts: list[str], title: str, width: int, with_bar: bool) -> tuple[str, str, int]:
    """Choose what of a progress line fits into a terminal.

    As many as fit of the first three parts (the count, the time left, the place) come first, then the title, a short
    bar, the other parts, and a longer bar.

    Args:
        parts: parts of the text, the most important first.
        title: name in front of the text.
        width: columns of the terminal.
        with_bar: True if there is something to draw a bar of.

    Returns:
        The text; the title, empty if it is left out; the columns of the bar, 0 without one.
    """
    shortest, longest = BAR_WIDTHS
    text, others = parts[0], parts[1:]
    while others and len(parts) - len(others) < 3 and len(text) + 2 + len(others[0]) <= width:
        text = f"{text}, {others.pop(0)}"
    left = width - len(text)
    title = title if left >= len(title) + 1 else ""
    left -= len(title) + 1 if title else 0
    bar = shortest if with_bar and left >= shortest + 1 else 0
    left -= bar + 1 if bar else 0
    for part in others:
        if len(part) + 2 > left:
            break
        text, left = f"{text}, {part}", left - len(part) - 2
    return text, title, min(longest, bar + left) if bar else 0


_active: list[Reporter] = []
"""Reporters in use, the innermost last."""


def say(text: str) -> None:
    """Print a line for people on standard error, above the progress if there is any."""
    if _active:
        _active[-1].message(text)
    else:
        _return_to_line_start()
        click.echo(text, err=True)


def _return_to_line_start() -> None:
    """Overwrite the "^C" that a terminal shows for Ctrl-C, to which the next line would be glued."""
    if sys.stderr.isatty():
        sys.stderr.write("\r")


def end_progress() -> None:
    """End all progress lines, before the process does."""
    for reporter in reversed(_active):
        reporter.close()


class MessageHandler(logging.Handler):
    """Log handler that prints messages as `say` does."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(self.format(record))
        except Exception:  # noqa: BLE001 - logging's contract: a message never ends the work
            self.handleError(record)


def _time(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))
