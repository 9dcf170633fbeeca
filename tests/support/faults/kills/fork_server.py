"""A process that has imported everything once and forks the suite's processes from there: a start takes
milliseconds instead of seconds, and what runs is a process of its own, in a session of its own."""

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
"""Nothing here takes that long; a process that does hangs."""

_SUPPORT = Path(__file__).parents[2]
_PR_SET_PDEATHSIG = 1


@dataclass
class Process:
    """A forked process. `output` is the file of what it prints, `session` equals `pid`."""

    pid: int
    output: Path
    status: int | None = field(default=None)

    @property
    def session(self) -> int:
        """Of it and everything that it starts."""
        return self.pid

    @property
    def code(self) -> int:
        """Exit code; negative: the signal that ended it."""
        assert self.status is not None, "it is running"
        return os.waitstatus_to_exitcode(self.status)

    def printed(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


class ForkServer:
    """Starts processes by role; see roles.py. Use as a context manager: whatever still runs is killed at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started = 0
        self._processes: dict[int, Process] = {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TMPDIR": str(folder)}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(_SUPPORT), os.environ.get("PYTHONPATH")])
        )
        # A file, so that whatever it prints by itself never fills a pipe.
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
        self._server.stdin.close()  # it kills what it started, and ends
        self._server.wait(timeout=GUARD_SECONDS)
        self._server.stdout.close()
        self._errors.close()

    def start(
        self,
        role: str,
        *,
        tracer: Callable[[int], object] | None = None,
        cwd: Path | None = None,
        **arguments: Any,
    ) -> Process:
        """Fork a process that plays `role`. `tracer` is called with its pid, and it waits until it is traced."""
        assert self._server.stdin is not None
        self._started += 1
        output = self._folder / f"{self._started:05d}-{role}.out"
        request = {
            "role": role,
            "arguments": arguments,
            "output": str(output),
            "traced": tracer is not None,
            "cwd": str(cwd or self._folder),
        }
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        before = set(self._processes)
        while not (new := self._processes.keys() - before):
            self._hear(time.monotonic() + GUARD_SECONDS)
        (pid,) = new
        process = self._processes[pid]
        process.output = output
        if tracer is not None:
            tracer(pid)
        return process

    def wait(self, process: Process, seconds: float = GUARD_SECONDS) -> int:
        """Its exit code, once it has ended; TimeoutError with what it said when it hangs."""
        deadline = time.monotonic() + seconds
        while process.status is None:
            try:
                self._hear(deadline)
            except TimeoutError:
                raise TimeoutError(
                    f"process {process.pid} runs after {seconds:.0f} s:\n{process.printed()}"
                ) from None
        self._processes.pop(process.pid, None)
        return process.code

    def running(self, process: Process) -> bool:
        """Whether it has not ended yet."""
        with contextlib.suppress(TimeoutError):
            while process.status is None:
                self._hear(time.monotonic())
        return process.status is None

    def kill(self, process: Process, signum: int = signal.SIGKILL) -> None:
        """Send a signal to it alone; nothing when it has ended."""
        if self.running(process):
            os.kill(process.pid, signum)

    def _hear(self, deadline: float) -> None:
        news = self._next_line(deadline)
        if "started" in news:
            self._processes[news["started"]] = Process(news["started"], Path())
        else:
            self._processes[news["ended"]].status = news["status"]

    def _next_line(self, deadline: float) -> dict[str, Any]:
        assert self._server.stdout is not None
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._server.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("no news from the fork_server")
            data = os.read(self._server.stdout.fileno(), 1 << 16)
            assert data, (
                f"the fork_server ended: {(self._folder / 'fork_server.err').read_text(errors='replace')[-2000:]}"
            )
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)


def serve() -> None:
    """The fork_server itself: requests on standard input, one line each; what starts and ends on standard output.

    One thread, so that forking is safe.
    """
    from faults.kills.programs import ROLES, prepare

    prepare()
    news = os.dup(1)
    os.dup2(2, 1)
    os.set_inheritable(news, False)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    private = (0, news, wake_read, wake_write)
    _tell(news, ready=True)
    living: set[int] = set()
    unread = b""
    while True:
        ready, _, _ = select.select([0, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 1 << 12)
            _reap(news, living)
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
                _become(json.loads(line), ROLES, private)
            living.add(pid)
            _tell(news, started=pid)
    for pid in living:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _tell(descriptor: int, **news: object) -> None:
    os.write(descriptor, json.dumps(news).encode() + b"\n")


def _reap(news: int, living: set[int]) -> None:
    while living:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        living.discard(pid)
        _tell(news, ended=pid, status=status)


def _become(request: dict[str, Any], roles: dict[str, Callable[..., int]], private: tuple[int, ...]) -> None:
    """Turn a fork into the process asked for; never returns."""
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
        code = roles[request["role"]](**request["arguments"])
    except BaseException:  # noqa: BLE001 - told in its output, and by its exit code
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
