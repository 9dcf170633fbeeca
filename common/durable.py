"""Durable writes, which survive a crash once they are reported done; the operating system's errors explained."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import MobileSamError, StoreError, shown

_MENDS = {
    errno.ENOSPC: "free some room and run again",
    errno.EDQUOT: "your disk quota is used up: free some room and run again",
    errno.ENOENT: "does it exist, on every machine that takes part?",
    errno.EEXIST: "a file is in the way, give another path",
    errno.ENOTDIR: "a file is in the way, give another path",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EIO: "the disk is failing: check it, and then the store with mobilesam inspect STORE --check",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EROFS: "choose a folder on a writable file system",
}

_DRAFT = re.compile(r"\.?(?P<name>.*?)\.[^.]+\.partial")
"""Name of what is being written: NAME.ATTEMPT.partial, .NAME.ATTEMPT.partial, or .ATTEMPT.partial in a folder."""


def fsync_directory(path: Path) -> None:
    """Sync a folder's entries to disk: without that, a rename in it may be lost in a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, synced to disk; do nothing if it exists."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_directory(folder.parent)


def write_atomic(path: Path, data: bytes, place: Callable[[Path, Path], None] | None = None) -> None:
    """Replace a file's content atomically and durably: temporary file, fsync, rename, fsync of the folder.

    Args:
        path: file to write or replace.
        data: its new content.
        place: function that moves the temporary file to `path`, and may refuse to; None: os.rename.

    Raises:
        OSError: it names the file; the old content is unchanged, and no temporary file is left.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        (place or os.rename)(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            error.filename = str(path)  # write and fsync don't say which file
        raise
    fsync_directory(path.parent)


def final_name(path: Path | str) -> str:
    """Return the path for a message: of a hidden file or folder that is being written, what it will be.

    Args:
        path: path of any file, such as `OSError.filename`.
    """
    drafts = map(_DRAFT.fullmatch, Path(path).parts)
    parts = [draft["name"] if draft else part for draft, part in zip(drafts, Path(path).parts, strict=True)]
    return str(Path(*parts)) if parts != list(Path(path).parts) else str(path)


@contextmanager
def explain_os_errors(
    path: Path, error: type[MobileSamError] = StoreError, option: str | None = None
) -> Iterator[None]:
    """Raise the operating system's errors inside the context as an error that says what to do.

    Args:
        path: file that the message names if the system's error names none.
        error: type of the error.
        option: source of the path, such as a command-line option, which the message names first; the context then
            writes to the path. None to leave it out.

    Raises:
        MobileSamError: of the type `error`, with the OSError as its cause.
    """
    try:
        yield
    except OSError as cause:
        mend = _MENDS.get(cause.errno or 0, "check the disk and run again")
        place, reason = shown(final_name(cause.filename or path)), cause.strerror or cause
        if option is None:
            raise error(f"{place}: {reason}; {mend}") from cause
        raise error(f"{option}: {place} can't be written: {reason}; {mend}") from cause
