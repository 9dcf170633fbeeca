"""Durability model: a file system that forgets, in a power cut, everything that was not synced.

A kill cannot show a missing fsync, since the kernel keeps what was written.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from faults.kills.strace import RENAMES, SYNCS, UNLINKS, WRITES
from faults.kills.trace import Event, kind_of

_OFFSETS = {
    "pwrite64": re.compile(r", (\d+)\) += \d+"),
    "pwritev": re.compile(r", (\d+)\) += \d+"),
    "pwritev2": re.compile(r", (\d+), \w+\) += \d+"),  # flags last
}

_AT_THE_END = frozenset(
    ["folder", "shard", "manifest", "zarr", "head", "last", "student", "mean", "config", "split", "metrics"]
)
"""Kinds of files that must be durable, with their names, once a command has succeeded."""


@dataclass
class File:
    """Unsynced bytes of a file: ranges of positioned writes, and the number appended."""

    ranges: list[tuple[int, int]] = field(default_factory=list)
    appended: int = 0

    @property
    def dirty(self) -> bool:
        """True if a power cut would lose bytes."""
        return bool(self.ranges or self.appended)


@dataclass(frozen=True)
class Change:
    """Unsynced change of a folder: a name made ("create"), moved from `source` ("rename") or removed ("unlink").

    `replaced` is True if another file had the name.
    """

    action: str
    path: str
    source: str = ""
    replaced: bool = False

    @property
    def folder(self) -> str:
        """Folder whose sync makes the change durable."""
        return str(PurePosixPath(self.path).parent)


class DurabilityModel:
    """State of the file system after events of all processes that wrote to the store or run at `root`.

    `before` are the files that existed at the start.
    """

    def __init__(self, root: Path, before: Iterable[Path] = ()) -> None:
        self._before = {str(path) for path in before}
        self.files: dict[str, File] = {}
        self.changes: list[Change] = []
        self.violations: list[str] = []
        self._root = root

    def run(self, events: Iterable[Event]) -> DurabilityModel:
        """Apply completed events in order of time; broken rules are added to `violations`."""
        for event in events:
            if event.result is None or event.result < 0 or kind_of(event.path, self._root) is None:
                continue
            if event.call in WRITES:
                self._write(event)
            elif event.call in SYNCS:
                self._sync(event.path)
            elif event.call in RENAMES:
                self._rename(event)
            elif event.call in UNLINKS:
                self.files.pop(event.path, None)
                self.changes.append(Change("unlink", event.path))
            elif event.call == "mkdir" or (event.call == "openat" and "O_CREAT" in event.text):
                self._create(event.path)
        return self

    def finished(self) -> list[str]:
        """Return all violations, with those at the end of a command that succeeded."""
        left = [
            f"at the end {path} has bytes that were not synced"
            for path, file in self.files.items()
            if file.dirty and self._lasts(path)
        ]
        left += [
            f"at the end the {change.action} of {change.path} was not synced"
            for change in self.changes
            if change.action != "unlink" and self._lasts(change.path)
        ]
        return self.violations + left

    def cut(self, place: Path, copy: Path) -> None:
        """Apply the worst power cut to `copy`, a copy of the folder `place`.

        Unsynced bytes become zeros, appended bytes and new names disappear. The content of a replaced or removed
        file is not known any more, so such a change stays.
        """
        for path, file in self.files.items():
            target = copy / Path(path).relative_to(place)
            if file.dirty and target.is_file():
                _forget(target, file)
        for change in reversed(self.changes):
            target = copy / Path(change.path).relative_to(place)
            if change.action == "create" and target.is_dir():
                shutil.rmtree(target)
            elif change.action == "create":
                target.unlink(missing_ok=True)
            elif change.action == "rename" and not change.replaced and target.exists():
                target.rename(copy / Path(change.source).relative_to(place))

    def _lasts(self, path: str) -> bool:
        return kind_of(path, self._root) in _AT_THE_END and not path.endswith(".partial")

    def _create(self, path: str) -> None:
        if path not in self.files and path not in self._before:
            self.files[path] = File()
            self.changes.append(Change("create", path))

    def _write(self, event: Event) -> None:
        kind = kind_of(event.path, self._root)
        if event.stage == "commit" and kind in ("journal", "manifest"):
            self._check_shards_last(event)
        file = self.files.setdefault(event.path, File())
        assert event.result is not None
        if event.call == "write":
            file.appended += event.result
        else:
            offset = _OFFSETS[event.call].search(event.text)
            assert offset is not None, event.text
            file.ranges.append((int(offset[1]), int(offset[1]) + event.result))

    def _sync(self, path: str) -> None:
        if path in self.files:
            self.files[path] = File()
        # For a folder, its names.
        self.changes = [change for change in self.changes if change.folder != path]

    def _rename(self, event: Event) -> None:
        source, place = event.paths
        for path, file in self._below(source):
            if file.dirty:
                self.violations.append(f"{place} was renamed into place before {path} was synced")
        if source != place and not source.endswith(".partial/"):
            for change in self.changes:
                if change.action != "unlink" and change.path.startswith(f"{source}/"):
                    self.violations.append(
                        f"{place} was renamed into place before {change.path}'s name was synced"
                    )
        if kind_of(place, self._root) in ("last", "previous"):
            for path, file in self.files.items():
                if kind_of(path, self._root) == "metrics" and file.dirty:
                    self.violations.append(f"{place} was renamed into place before {path} was synced")
        replaced = place in self.files or place in self._before
        for path, file in list(self._below(source)):
            del self.files[path]
            self.files[place + path[len(source) :]] = file
        self.changes = [self._moved(change, source, place) for change in self.changes]
        self.changes.append(Change("rename", place, source, replaced))

    def _below(self, path: str) -> Iterator[tuple[str, File]]:
        return ((name, file) for name, file in self.files.items() if f"{name}/".startswith(f"{path}/"))

    def _moved(self, change: Change, source: str, place: str) -> Change:
        """Return the change with its path after a rename of a folder above it."""
        if change.action == "create" and change.path == source:
            return change
        if change.path.startswith(f"{source}/"):
            return Change(change.action, place + change.path[len(source) :], change.source, change.replaced)
        return change

    def _check_shards_last(self, event: Event) -> None:
        for path, file in self.files.items():
            if kind_of(path, self._root) == "shard" and file.dirty:
                self.violations.append(f"{event.path} was written before {path} was synced")
        for change in self.changes:
            if change.action == "rename" and kind_of(change.path, self._root) == "shard":
                self.violations.append(f"{event.path} was written before {change.path}'s folder was synced")


def _forget(target: Path, file: File) -> None:
    with target.open("r+b") as opened:
        size = opened.seek(0, 2)
        for start, stop in file.ranges:
            opened.seek(start)
            opened.write(bytes(max(0, min(stop, size) - start)))
        opened.truncate(max(0, size - file.appended))


def merged(*traces: Iterable[Event]) -> list[Event]:
    """Merge the events of several processes in order of time."""
    return sorted((event for trace in traces for event in trace), key=lambda event: event.time)
