"""A small disk: a tmpfs that exists in one process's own mount namespace, and what is run there."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS, _MS_RDONLY, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 0x20000, 1, 32, 16384, 1 << 18


@dataclass(frozen=True)
class CallResult:
    """What a call gave, or the name of its error's type and the message."""

    value: Any = None
    error: str | None = None
    message: str = ""


class Disk:
    """The disk seen from here: `path` is where it is mounted, for the one process that has it."""

    def __init__(self, path: Path, size: int, pool: ProcessPoolExecutor) -> None:
        self.path = path
        self._size = size
        self._pool = pool
        self.pid: int = self.call(os.getpid).value

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> CallResult:
        """Call a function of a module there."""
        return self._pool.submit(_outcome, function, arguments, options).result()

    def leave(self, free: int | None) -> None:
        """Make the disk so small that this many bytes are free; None: as large as it was."""
        self._do(_resize, self.path, self._size, free)

    def read_only(self, on: bool) -> None:
        """Remount it read-only, or writable again."""
        self._do(_mount, None, self.path, _MS_REMOUNT | (_MS_RDONLY if on else 0), "")

    @property
    def prefix(self) -> tuple[str, ...]:
        """Words before a command that is to see the disk."""
        return ("nsenter", "--target", str(self.pid), "--mount", f"--wd={os.getcwd()}", "--")

    def _do(self, function: Callable[..., Any], *arguments: Any) -> None:
        outcome = self.call(function, *arguments)
        assert outcome.error is None, outcome


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[Disk]:
    """A disk of `size` bytes at a folder; OSError where this user may not mount one."""
    path.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        outcome = pool.submit(_outcome, _separate, (path, size), {}).result()
        if outcome.error:
            raise OSError(outcome.message)
        yield Disk(path, size, pool)


def _outcome(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> CallResult:
    try:
        return CallResult(function(*arguments, **options))
    except Exception as error:  # noqa: BLE001 - it is told on the other side
        return CallResult(error=type(error).__name__, message=str(error))


def _separate(path: Path, size: int) -> None:
    # Threads begun before would stay in the old namespace.
    assert threading.active_count() <= 2, threading.enumerate()
    _check(_libc.unshare(_CLONE_NEWNS))
    _mount(None, Path("/"), _MS_REC | _MS_PRIVATE, "")
    _mount("tmpfs", path, 0, f"size={size},mode=755")


def _mount(kind: str | None, path: Path, flags: int, options: str) -> None:
    name = None if kind is None else kind.encode()
    _check(_libc.mount(name, os.fsencode(path), name, flags, options.encode()))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _resize(path: Path, size: int, free: int | None) -> None:
    if free is not None:
        disk = os.statvfs(path)
        # 0 would mean no limit, and an empty disk takes a page.
        size = max((disk.f_blocks - disk.f_bfree) * disk.f_frsize + free, disk.f_frsize)
    _mount(None, path, _MS_REMOUNT, f"size={size}")
