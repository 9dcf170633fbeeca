"""Small disk: a tmpfs in the mount namespace of one process, which runs functions there."""

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
    """Return value of a call, or the name of its error's type and the message."""

    value: Any = None
    error: str | None = None
    message: str = ""


class Disk:
    """Small disk, mounted at `path` for the one process that has it."""

    def __init__(self, path: Path, size: int, pool: ProcessPoolExecutor) -> None:
        self.path = path
        self._size = size
        self._pool = pool
        self.pid: int = self.call(os.getpid).value

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> CallResult:
        """Call a module's function in the process that has the disk."""
        return self._pool.submit(_call, function, arguments, options).result()

    def leave(self, free: int | None) -> None:
        """Shrink the disk until `free` bytes are free; None restores its size."""
        self._do(_resize, self.path, self._size, free)

    def read_only(self, on: bool) -> None:
        """Remount it read-only, or writable again."""
        self._do(_mount, None, self.path, _MS_REMOUNT | (_MS_RDONLY if on else 0), "")

    @property
    def prefix(self) -> tuple[str, ...]:
        """Words that precede a command to run it with the disk mounted."""
        return ("nsenter", "--target", str(self.pid), "--mount", f"--wd={os.getcwd()}", "--")

    def _do(self, function: Callable[..., Any], *arguments: Any) -> None:
        outcome = self.call(function, *arguments)
        assert outcome.error is None, outcome


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[Disk]:
    """Mount a disk of `size` bytes at a folder.

    Raises:
        OSError: This user may not mount one.
    """
    path.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        outcome = pool.submit(_call, _separate, (path, size), {}).result()
        if outcome.error:
            raise OSError(outcome.message)
        yield Disk(path, size, pool)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> CallResult:
    try:
        return CallResult(function(*arguments, **options))
    except Exception as error:  # noqa: BLE001 - reported to the caller
        return CallResult(error=type(error).__name__, message=str(error))


def _separate(path: Path, size: int) -> None:
    # Threads started before would stay in the old namespace.
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
