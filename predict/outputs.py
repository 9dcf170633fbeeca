"""Output files of a command: checked before any long work, then written together and atomically."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from ..common.durable import explain_os_errors, fsync_directory
from ..common.errors import PredictError, shown
from ..common.outputs import marked, place_output, refuse_foreign
from ..sam.photos.file_kinds import store_around

_PARTIAL_NAME = re.compile(r"\.[0-9a-f]{8}\.partial")

OVERLAY, MASK, RLE, EXPORT = "segment overlay", "segment mask", "segment rle file", "export"
"""Kinds of output files, as their marks name them."""

MAX_DESCRIPTION = 1 << 20
"""Largest number of bytes read of a file that describes an export."""


def _no_older(_: Path) -> bool:
    return False


def check_file(path: Path, option: str, kind: str, is_older: Callable[[Path], bool] = _no_older) -> None:
    """Refuse a file that can't be created, or that may not be replaced.

    Args:
        path: file to be written later.
        option: option of the command line that names it, for messages.
        kind: kind of output; files of the same kind may be replaced.
        is_older: returns True for a file of this kind that a version without marks wrote.

    Raises:
        PredictError: it is a folder or a device, its folder is missing or can't be written to, or it is there and no
            unchanged output of the same kind.
    """
    with explain_os_errors(path, PredictError, option):
        if path.is_dir():
            raise PredictError(f"{option} {shown(str(path))} is a folder: give a file's name")
        if path.exists() and not path.is_file():
            raise PredictError(f"{option} {shown(str(path))} is not a regular file: give another name")
        check_writable(path.resolve().parent, option)
    with explain_os_errors(path, PredictError):
        refuse_foreign(path, kind, option, PredictError, is_older)


def check_writable(folder: Path, option: str) -> None:
    """Check that files can be created in a folder, by creating one and removing it.

    Args:
        folder: folder of the output.
        option: option of the command line that names it, for messages.

    Raises:
        PredictError: the folder is missing or lies in a store, or no file can be created in it.
    """
    if (store := store_around(str(folder.resolve()))) is not None:
        raise PredictError(
            f"{option}: {shown(str(folder))} lies in the store {shown(store)}: give another folder"
        )
    with explain_os_errors(folder, PredictError, option):
        if not folder.is_dir():
            raise PredictError(f"{option}: there is no folder {shown(str(folder))}; make it first")
        trial = _partial(folder)
        trial.touch()
        trial.unlink()


def read_description(path: Path, format: str) -> dict[str, Any] | None:
    """Return the JSON object that describes an export in a folder; None if the file is no object of this format.

    Args:
        path: JSON file; may not exist.
        format: value of its key `format`.
    """
    try:
        with open(path, "rb") as file:
            description = json.loads(file.read(MAX_DESCRIPTION))
    except (OSError, ValueError, RecursionError):
        return None
    return description if isinstance(description, dict) and description.get("format") == format else None


class Outputs:
    """Output files that are written under temporary names, and renamed together by `commit`.

    A context manager: on exit, temporary files that weren't committed are removed, and after an error also the
    folders made by `make_folder`, if empty. All methods raise PredictError if a file can't be written.
    """

    def __init__(self) -> None:
        # Temporary file, final path, option that names it, check of a file that is there.
        self._written: list[tuple[Path, Path, str, Callable[[], None]]] = []
        self._made: list[Path] = []

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for partial, *_ in self._written:
            partial.unlink(missing_ok=True)
        if kind is not None:
            for folder in self._made:
                if not any(folder.iterdir()):
                    folder.rmdir()

    def make_folder(self, path: Path, option: str) -> None:
        """Make a folder if it doesn't exist.

        Args:
            path: the folder; its parent must exist.
            option: option of the command line that names it, for messages.
        """
        with explain_os_errors(path, PredictError, option):
            if not path.is_dir():
                path.mkdir()
                self._made.append(path)

    def add(
        self,
        path: Path,
        data: bytes,
        option: str,
        kind: str,
        is_older: Callable[[Path], bool] = _no_older,
    ) -> bytes:
        """Write a file with a mark, durably, under a temporary name in the folder of `path`.

        Args:
            path: final path, which passed `check_file`; of a symbolic link, the target is replaced.
            data: content without a mark.
            option: option of the command line that names the file, for messages.
            kind: kind of output.
            is_older: as for `check_file`.

        Returns:
            The content with its mark.
        """
        data = marked(data, kind)
        self.add_unmarked(
            path, data, option, lambda: refuse_foreign(path, kind, option, PredictError, is_older)
        )
        return data

    def add_unmarked(self, path: Path, data: bytes, option: str, refuse: Callable[[], None]) -> None:
        """Write a file as it is, durably, under a temporary name in the folder of `path`.

        Args:
            path: final path; of a symbolic link, the target is replaced.
            data: content.
            option: option of the command line that names the file, for messages.
            refuse: called by `commit` if there is a file at `path`; raises if it may not be replaced.
        """
        path = path.resolve()
        partial = _partial(path.parent)
        self._written.append((partial, path, option, refuse))
        with explain_os_errors(path, PredictError, option), open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def commit(self, stale: Iterable[Path] = ()) -> None:
        """Rename every file to its final path, and remove the `stale` files that weren't replaced.

        Raises:
            PredictError: a file can't be renamed, or another file appeared at its path; then none is renamed that
                comes after it.
        """
        for _, path, option, refuse in self._written:
            with explain_os_errors(path, PredictError, option):
                if path.exists():
                    refuse()
        for partial, path, option, refuse in self._written:
            with explain_os_errors(path, PredictError, option):
                place_output(partial, path, refuse)
        replaced = {path for _, path, *_ in self._written}
        for path in stale:
            if path.resolve() not in replaced:
                with explain_os_errors(path, PredictError, "an older file"):
                    path.unlink()
        for folder in {path.parent for path in replaced}:
            fsync_directory(folder)
        self._written.clear()
        self._made.clear()


def is_partial(path: Path) -> bool:
    """Return True if the file's name is that of a temporary file, as a killed command may leave behind."""
    return _PARTIAL_NAME.fullmatch(path.name) is not None


def _partial(folder: Path) -> Path:
    return folder / f".{uuid.uuid4().hex[:8]}.partial"
