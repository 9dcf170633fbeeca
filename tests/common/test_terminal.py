"""Streams that never raise; progress as a line that is drawn again, or as lines; in a pseudo-terminal."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest

from mobilesam.common.terminal import SafeStream, fit, guarded_streams


@pytest.fixture
def broken_pipe() -> Iterator[io.TextIOWrapper]:
    """A buffered stream into a pipe that nobody reads; closing it would raise if anything were left in its buffer."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        yield stream


def test_a_line_that_nobody_reads_is_dropped_and_the_first_failure_kept(
    broken_pipe: io.TextIOWrapper,
) -> None:
    stream = SafeStream(broken_pipe)
    for _ in range(3):
        stream.write("line\n" * 10_000)
        stream.flush()
    assert stream.failure is not None
    assert stream.failure.errno == errno.EPIPE


def test_after_a_full_disk_has_room_again_lines_are_written_again() -> None:
    with open("/dev/full", "w") as full:
        stream = SafeStream(full)
        stream.write("lost\n")
        stream.flush()
        read, write = os.pipe()
        os.dup2(write, full.fileno())
        os.close(write)
        stream.write("found\n")
        stream.flush()
    with open(read) as pipe:
        assert pipe.read() == "found\n"


def test_a_stream_that_was_closed_or_never_open_takes_lines_and_says_so() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (SafeStream(closed), SafeStream(None)):
        stream.write("lost\n")
        stream.flush()
        assert stream.failure is not None


def test_letters_that_the_stream_has_not_are_escaped() -> None:
    data = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(data, encoding="ascii"))
    stream.write("naïve.png\n")
    stream.flush()
    assert data.getvalue() == b"na\\xefve.png\n"
    assert stream.failure is None


def test_the_standard_streams_are_guarded_inside_and_restored_after() -> None:
    before = sys.stdout, sys.stderr
    with guarded_streams() as output:
        assert sys.stdout is output
        assert isinstance(sys.stderr, SafeStream)
    assert (sys.stdout, sys.stderr) == before


PARTS = ["12/500 steps", "0:11:58 left", "epoch 1 of 3", "train", "loss 0.8726", "1.77 images/s"]


@pytest.mark.parametrize(
    ("width", "kept", "title", "bar"),
    [
        (20, 1, "distill", 0),
        (30, 2, "", 0),
        (39, 2, "distill", 0),
        (59, 3, "distill", 10),
        (79, 5, "distill", 10),
        (119, 6, "distill", 35),
        (200, 6, "distill", 40),
    ],
)
def test_what_matters_most_is_kept_on_narrow_terminals(width: int, kept: int, title: str, bar: int) -> None:
    text, shown_title, columns = fit(PARTS, "distill", width, with_bar=True)
    assert text == ", ".join(PARTS[:kept])
    assert (shown_title, columns) == (title, bar)
    assert len(text) + (len(title) + 1) * bool(title) + (bar + 1) * bool(bar) <= width


PROGRAM = """
import time
from types import SimpleNamespace
from mobilesam.common.terminal import Reporter, guarded_streams, say
Reporter.LINE_SECONDS = Reporter.QUIET_SECONDS = 0.1
with guarded_streams(), Reporter("distill") as reporter:
    reporter.phase("loading the model")
    time.sleep(0.35)
    say("a message")
    reporter.training(SimpleNamespace(step=12, steps=500, epoch=1, epochs=3, phase="train", loss=0.8726,
        images_per_second=1.77, eta_seconds=718, evaluated=0, to_evaluate=0))
    time.sleep(0.35)
    reporter.training(SimpleNamespace(step=12, steps=500, epoch=1, epochs=3, phase="validate", loss=0.8726,
        images_per_second=1.77, eta_seconds=718, evaluated=5, to_evaluate=20))
    time.sleep(0.35)
"""


def seen(columns: int, **variables: str) -> list[str]:
    """Return what a pseudo-terminal of this width is sent, at each return of the cursor to the line's start."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**environment, "TERM": "xterm", **variables},
    )  # fmt: skip
    os.close(theirs)
    data = b""
    try:
        while piece := os.read(ours, 4096):
            data += piece
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return [line for line in re.split(r"[\r\n]+", data.decode().replace("\x1b[2K", "")) if line]


def plain(lines: list[str]) -> list[str]:
    """Return the lines without colours."""
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_steps_and_time_left_are_shown_whole_at_every_width(columns: int) -> None:
    lines = plain(seen(columns))
    drawn = [line for line in lines if "12/500 steps, 0:11:58 left" in line]
    assert drawn
    assert max(map(len, drawn)) < columns
    assert any("validate 5/20 images" in line for line in drawn) == (columns >= 60)
    assert any("loading the model, 0:00:0" in line for line in lines)
    assert "a message" in lines


def test_no_line_is_glued_to_the_progress_and_the_cursor_is_never_left_hidden() -> None:
    lines = seen(60)
    assert "a message" in plain(lines)
    together = "\n".join(lines)
    assert together.rfind("\x1b[?25h") > together.rfind("\x1b[?25l")
    assert "\x1b[?25l\x1b[?25h" in together, "shown again at once, so that a kill leaves it visible"


def test_a_dumb_terminal_gets_lines_without_escape_codes() -> None:
    lines = seen(60, TERM="dumb")
    assert not any("\x1b" in line for line in lines)
    assert re.fullmatch(r"loading the model, 0:00:0\d so far", lines[0])
    assert "a message" in lines
    assert any(
        line.startswith("12/500 steps, 0:11:58 left, epoch 1 of 3, train, loss 0.8726") for line in lines
    )


def test_no_color_is_honoured() -> None:
    assert any(
        "\x1b[9" in line or "\x1b[3" in line for line in seen(120, COLORTERM="", TERM="xterm-256color")
    )
    assert not any(re.search(r"\x1b\[[0-9;]*3[0-9]m|\x1b\[9[0-9]m", line) for line in seen(120, NO_COLOR="1"))


def test_a_pipe_gets_lines_even_where_colours_are_forced() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True, text=True, check=True, env={**os.environ, "FORCE_COLOR": "1"},
    )  # fmt: skip
    assert "?25" not in done.stderr
    assert "12/500 steps, 0:11:58 left, epoch 1 of 3, train" in "\n".join(plain(done.stderr.splitlines()))
