"""Fork server: a process that has imported everything and forks the suite's processes.

A start takes milliseconds instead of seconds. Each fork is a real process in a session of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from faults.kills.strace import is_traced

GUARD_SECONDS = 300.0
"""Seconds after which a process counts as hung."""

_SUPPORT = Path(__file__).parents[2]
_PR_SET_PDEATHSIG = 1


@dataclass
class Process:
    """Forked process; `output` is the file that it prints to."""

    pid: int
    output: Path
    status: int | None = field(default=None)

    @property
    def session(self) -> int:
        """Session id of the process and its descendants; equals `pid`."""
        return self.pid

    @property
    def code(self) -> int:
        """Exit code; negative for the signal that ended it."""
        assert self.status is not None, "it is running"
        return os.waitstatus_to_exitcode(self.status)

    def printed(self) -> str:
        """Return what the process has printed so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


class ForkServer:
    """Client that starts programs (programs.py) in the fork server; a context manager that kills them at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started = 0
        self._processes: dict[int, Process] = {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TMPDIR": str(folder)}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(_SUPPORT), os.environ.get("PYTHONPATH")])
        )
        # A file: a pipe could fill up.
        self._errors = (folder / "fork_server.err").open("wb")
        self._server = subprocess.Popen(
            [sys.executable, "-m", "faults.kills.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        assert self._server.stdout is not None
        self._unread = b""
        assert self._next_line(time.monotonic() + GUARD_SECONDS) == {"ready": True}

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()  # the server kills its processes and ends
        self._server.wait(timeout=GUARD_SECONDS)
        self._server.stdout.close()
        self._errors.close()

    def start(
        self,
        program: str,
        *,
        tracer: Callable[[int], object] | None = None,
        cwd: Path | None = None,
        **arguments: Any,
    ) -> Process:
        """Fork a process that runs a program.

        Args:
            program: Name in PROGRAMS.
            tracer: Called with the process's id; the process waits until it is traced.
            cwd: Working directory; the server's folder if None.
            **arguments: Arguments of the program, JSON values.

        Returns:
            The running process.
        """
        assert self._server.stdin is not None
        self._started += 1
        output = self._folder / f"{self._started:05d}-{program}.out"
        request = {
            "program": program,
            "arguments": arguments,
            "output": str(output),
            "traced": tracer is not None,
            "cwd": str(cwd or self._folder),
        }
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        before = set(self._processes)
        while not (new := self._processes.keys() - before):
            self._receive(time.monotonic() + GUARD_SECONDS)
        (pid,) = new
        process = self._processes[pid]
        process.output = output
        if tracer is not None:
            tracer(pid)
        return process

    def wait(self, process: Process, seconds: float = GUARD_SECONDS) -> int:
        """Wait for the end of a process and return its exit code.

        Raises:
            TimeoutError: It still runs after `seconds`; the message has what it printed.
        """
        deadline = time.monotonic() + seconds
        while process.status is None:
            try:
                self._receive(deadline)
            except TimeoutError:
                raise TimeoutError(
                    f"process {process.pid} runs after {seconds:.0f} s:\n{process.printed()}"
                ) from None
        self._processes.pop(process.pid, None)
        return process.code

    def running(self, process: Process) -> bool:
        """Return True if the process has not ended."""
        with contextlib.suppress(TimeoutError):
            while process.status is None:
                self._receive(time.monotonic())
        return process.status is None

    def kill(self, process: Process, signum: int = signal.SIGKILL) -> None:
        """Send a signal to the process alone, if it has not ended."""
        if self.running(process):
            os.kill(process.pid, signum)

    def _receive(self, deadline: float) -> None:
        message = self._next_line(deadline)
        if "started" in message:
            self._processes[message["started"]] = Process(message["started"], Path())
        else:
            self._processes[message["ended"]].status = message["status"]

    def _next_line(self, deadline: float) -> dict[str, Any]:
        assert self._server.stdout is not None
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._server.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("no message from the fork server")
            data = os.read(self._server.stdout.fileno(), 1 << 16)
            assert data, (
                f"the fork server ended: {(self._folder / 'fork_server.err').read_text(errors='replace')[-2000:]}"
            )
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)


def serve() -> None:
    """Run the server: requests come on standard input, starts and ends go to standard output, one JSON line each.

    The server has one thread, so that forking is safe.
    """
    from faults.kills.programs import PROGRAMS, prepare

    prepare()
    replies = os.dup(1)
    os.dup2(2, 1)
    os.set_inheritable(replies, False)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    private = (0, replies, wake_read, wake_write)
    _send(replies, ready=True)
    children: set[int] = set()
    unread = b""
    while True:
        ready, _, _ = select.select([0, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 1 << 12)
            _reap(replies, children)
        if 0 not in ready:
            continue
        data = os.read(0, 1 << 16)
        if not data:
            break
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _run_child(json.loads(line), PROGRAMS, private)
            children.add(pid)
            _send(replies, started=pid)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _send(descriptor: int, **message: object) -> None:
    os.write(descriptor, json.dumps(message).encode() + b"\n")


def _reap(replies: int, children: set[int]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        children.discard(pid)
        _send(replies, ended=pid, status=status)


def _run_child(
    request: dict[str, Any], programs: dict[str, Callable[..., int]], private: tuple[int, ...]
) -> None:
    """Run the requested program in the forked child; never returns."""
    code = 70
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for descriptor in private:
            os.close(descriptor)
        assert os.open(os.devnull, os.O_RDONLY) == 0
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.chdir(request["cwd"])
        while request["traced"] and not is_traced("self"):
            time.sleep(0.002)
        code = programs[request["program"]](**request["arguments"])
    except BaseException:  # noqa: BLE001 - printed, and seen by the exit code
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
