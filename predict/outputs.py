"""Files that a command leaves: checked before any long work, and written together, each of them whole."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from ..common.durable import fsync_directory
from ..common.errors import PredictError, shown

PARTIAL = ".partial"


def check_file(path: Path, option: str) -> None:
    """Refuses a file that could not be made or replaced in the end.

    Raises PredictError when it is a folder or a device, or its folder is missing or can't be written to.
    """
    with explained(path, option):
        if path.is_dir():
            raise PredictError(f"{option} {shown(str(path))} is a folder: give a file's name")
        if path.exists() and not path.is_file():
            raise PredictError(f"{option} {shown(str(path))} is not a regular file: give another name")
        check_writable(path.resolve().parent, option)


def check_writable(folder: Path, option: str) -> None:
    """Raises PredictError unless `folder` is one that files can be made in."""
    with explained(folder, option):
        if not folder.is_dir():
            raise PredictError(f"{option}: there is no folder {shown(str(folder))}; make it first")
        trial = _partial(folder)
        trial.touch()
        trial.unlink()


@contextmanager
def explained(path: Path, option: str) -> Iterator[None]:
    """The operating system's refusals as PredictError."""
    try:
        yield
    except OSError as error:
        place = shown(str(error.filename or path))
        raise PredictError(f"{option}: {place} can't be written: {error.strerror or error}") from error


class Outputs:
    """Files written beside their places, which all take their places at `commit`; none do without it.

    Used as a context, which leaves nothing behind when it ends early. Raises PredictError when a file can't be
    written.
    """

    def __init__(self) -> None:
        self._written: list[tuple[Path, Path, str]] = []
        self._made: list[Path] = []

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for partial, _, _ in self._written:
            partial.unlink(missing_ok=True)
        if kind is not None:
            for folder in self._made:
                if not any(folder.iterdir()):
                    folder.rmdir()

    def make_folder(self, path: Path, option: str) -> None:
        """Makes a folder where there is none."""
        with explained(path, option):
            if not path.is_dir():
                path.mkdir()
                self._made.append(path)

    def add(self, path: Path, data: bytes, option: str) -> None:
        """Writes a file's content durably, under another name in the same folder."""
        # A link stays one: what it points to is replaced.
        path = path.resolve()
        partial = _partial(path.parent)
        self._written.append((partial, path, option))
        with explained(path, option), open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def commit(self, stale: Iterable[Path] = ()) -> None:
        """Puts every file into its place, and removes those in `stale` that weren't replaced."""
        for partial, path, option in self._written:
            with explained(path, option):
                os.replace(partial, path)
        replaced = {path for _, path, _ in self._written}
        for path in stale:
            if path.resolve() not in replaced:
                with explained(path, "an older file"):
                    path.unlink()
        for folder in {path.parent for path in replaced}:
            fsync_directory(folder)
        self._written.clear()
        self._made.clear()


def _partial(folder: Path) -> Path:
    return folder / f".{uuid.uuid4().hex[:8]}{PARTIAL}"
