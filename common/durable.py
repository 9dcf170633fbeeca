"""Durable writes: what was reported written is there after a crash; and the operating system's errors in words."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import MobileSamError, StoreError, shown

_MENDS = {
    errno.ENOSPC: "free some room and run again",
    errno.EDQUOT: "your disk quota is used up: free some room and run again",
    errno.ENOENT: "is it there, on every machine that works on it?",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EIO: "the disk fails: check it, and then the store with mobilesam inspect STORE --check",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EROFS: "choose a folder on a writable file system",
}


def fsync_directory(path: Path) -> None:
    """Make the names in a folder durable: a rename is not until its folder is synced."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, with their names durable; do nothing if it exists."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_directory(folder.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file's content as a whole: temporary file, fsync, rename, fsync of the folder.

    Raises:
        OSError: with the file's name; the old content is still there, and no temporary file is left.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # write and fsync don't say which file
        raise
    fsync_directory(path.parent)


@contextmanager
def explain_os_errors(
    path: Path, error: type[MobileSamError] = StoreError, option: str | None = None
) -> Iterator[None]:
    """Raise the operating system's errors inside the context as one of ours: the file, the reason, the mend.

    Args:
        path: named in the message where the system's error names no file.
        error: exception to raise.
        option: command line option, or words, that the path comes from; named first in the message.

    Raises:
        MobileSamError: of the type `error`, with the OSError as its cause.
    """
    try:
        yield
    except OSError as cause:
        mend = _MENDS.get(cause.errno or 0, "check the disk and run again")
        place, reason = shown(str(cause.filename or path)), cause.strerror or cause
        if option is None:
            raise error(f"{place}: {reason}; {mend}") from cause
        raise error(f"{option}: {place} can't be written: {reason}; {mend}") from cause
