"""Traces of system calls: strace's log as events with thread, files, stage of the job and result."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from faults.kills.strace import KILL, Injection

_LINE = re.compile(r"^(\d+) +([\d.]+) (\w+)\((.*)$")
_RESUMED = re.compile(r"^(\d+) +[\d.]+ <\.\.\. \w+ resumed>(.*)$")
_UNFINISHED = " <unfinished ...>"
_RESULT = re.compile(r"\) += (-?\d+|\?)(.*)$")
_DESCRIPTOR = re.compile(r"^-?\d+<(/[^>]*)>")
_CWD = re.compile(r"^AT_FDCWD<(/[^>]*)>")
_AT = re.compile(r'(?:(?:AT_FDCWD|\d+)<(/[^>]*)>(?:\(deleted\))?, )?"((?:[^"\\]|\\.)*)"')
_STAGE = re.compile(r'>, "([+!-])(\w+)( \w+)?\\n"')
_BY_PATH = frozenset(
    ["openat", "mkdir", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "symlink", "symlinkat",
     "link", "linkat", "chmod"]
)  # fmt: skip


@dataclass(frozen=True)
class Event:
    """One system call.

    `time` is its start in seconds since the epoch, `ordinal` its number among the same thread's calls of this name,
    from 1; `result` is None if it never returned.
    """

    thread: int
    call: str
    paths: tuple[str, ...]
    text: str
    ordinal: int
    stage: str
    time: float
    result: int | None = None
    injected: bool = False

    @property
    def path(self) -> str:
        """File that the call acts on; for a rename, the target."""
        return self.paths[-1] if self.paths else ""


@dataclass(frozen=True)
class Trace:
    """Events of one traced process, in the order of their start."""

    events: tuple[Event, ...]
    killed: bool

    def hit(self, injection: Injection) -> Event | None:
        """Return the event that the injection hit, None if it did not fire."""
        for event in self.events:
            if event.call != injection.call:
                continue
            if injection.effect == KILL:
                if self.killed and event.ordinal == injection.ordinal and event.result is None:
                    return event
            elif event.injected:
                return event
        return None


def read_trace(log: Path, stage_file: Path) -> Trace:
    """Parse strace's log; writes to `stage_file` give the stages and are no events."""
    reader = _Reader(str(stage_file))
    killed = False
    with log.open(errors="replace") as lines:
        for line in lines:
            killed = killed or "+++ killed by SIGKILL +++" in line
            reader.line(line.rstrip("\n"))
    return Trace(tuple(reader.events), killed)


class _Reader:
    def __init__(self, stage_file: str) -> None:
        self.events: list[Event] = []
        self._stage_file = stage_file
        self._cwd = "/"  # until a call shows it
        self._counts: Counter[tuple[int, str]] = Counter()
        self._stages: dict[int, list[str]] = defaultdict(list)
        self._open: dict[int, int] = {}

    def line(self, line: str) -> None:
        """Parse one line."""
        if resumed := _RESUMED.match(line):
            place = self._open.pop(int(resumed[1]), None)
            if place is not None:
                event = self.events[place]
                text = event.text.removesuffix(_UNFINISHED) + resumed[2]
                self.events[place] = _ended(replace(event, text=text))
        elif started := _LINE.match(line):
            self._started(int(started[1]), float(started[2]), started[3], started[4])

    def _started(self, thread: int, time: float, call: str, text: str) -> None:
        self._counts[thread, call] += 1
        if cwd := _CWD.match(text):
            self._cwd = cwd[1]
        paths = _paths(call, text, self._cwd)
        if paths == (self._stage_file,):
            self._read_stage(thread, text)
            return
        stages = self._stages[thread]
        event = Event(
            thread=thread,
            call=call,
            paths=paths,
            text=text,
            ordinal=self._counts[thread, call],
            stage=stages[-1] if stages else "",
            time=time,
        )
        if text.endswith(_UNFINISHED):
            self._open[thread] = len(self.events)
        self.events.append(_ended(event))

    def _read_stage(self, thread: int, rest: str) -> None:
        mark = _STAGE.search(rest)
        if mark is None:
            return
        if mark[1] == "+":
            self._stages[thread].append(mark[2])
        elif mark[2] in self._stages[thread]:
            while self._stages[thread].pop() != mark[2]:
                pass


def _ended(event: Event) -> Event:
    result = _RESULT.search(event.text)
    if result is None or result[1] == "?":
        return event
    return replace(event, result=int(result[1]), injected="(INJECTED)" in result[2])


def _paths(call: str, rest: str, cwd: str) -> tuple[str, ...]:
    """Return the absolute paths that a call names."""
    if call not in _BY_PATH:
        descriptor = _DESCRIPTOR.match(rest)
        return (descriptor[1].removesuffix("(deleted)"),) if descriptor else ()
    found = [os.path.join(folder or cwd, name) for folder, name in _AT.findall(rest)]
    if call in ("symlink", "symlinkat"):
        found = found[-1:]
    return tuple(os.path.normpath(path) for path in found)


_KINDS = [
    (re.compile(pattern), kind)
    for pattern, kind in [
        (r"^(\w+/)?zarr\.json(\.\w+\.partial)?$", "zarr"),
        (r"^\w+/c[.\d]*\.\w+\.partial$", "partial"),
        (r"^\w+/c[.\d]*$", "shard"),
        (r"^\w+/mobilesam/manifest\.sqlite$", "manifest"),
        (r"^\w+/mobilesam/manifest\.sqlite-\w+$", "journal"),
        (r"^\w+/mobilesam/writer\.lock$", "lock"),
        (r"^\w+/mobilesam/writer\.json", "owner"),
        (r"^\w+/mobilesam/sam_head", "head"),
        (r"^\w+/mobilesam$", "private"),
        (r"^(embeddings|scales)$", "array"),
        (r"^\.$", "folder"),
        (r"^config\.json", "config"),
        (r"^split\.json", "split"),
        (r"^metrics\.jsonl", "metrics"),
        (r"^events\.", "curves"),
        (r"^last\.pt", "last"),
        (r"^previous\.pt", "previous"),
        (r"^next\.pt", "next"),
        (r"^student\.", "student"),
        (r"^mean_embedding\.", "mean"),
        (r"^sam_head\.", "head"),
        (r"^run\.lock", "lock"),
    ]
]


def kind_of(path: str, root: Path) -> str | None:
    """Return the kind of a file in the store or run at `root`, or in a partial one; None for other files."""
    if path == str(root.parent):
        return "parent"
    if path.startswith((str(root.parent / "runs" / "latest"), str(root.parent / "runs" / ".latest"))):
        return "latest"
    inside = re.match(rf"^{re.escape(str(root))}(\.[0-9a-f]+\.partial)?(?:/|$)", path)
    if inside is None:
        return None
    name = path[inside.end() :] or "."
    return next((kind for pattern, kind in _KINDS if pattern.search(name)), "other")
