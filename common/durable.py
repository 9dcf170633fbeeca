"""Writing so that what was reported written is there after a crash."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StoreError


def fsync_directory(path: Path) -> None:
    """Make the names in a folder durable (a rename is not, until its folder is synced)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, with their names durable; nothing where there is one."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_directory(folder.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file's content as a whole: temporary file, fsync, rename, fsync of the folder."""
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
def explained(path: Path) -> Iterator[None]:
    """The operating system's refusals as StoreError, with the mend."""
    try:
        yield
    except OSError as error:
        mend = {
            errno.ENOSPC: "free some room and run again",
            errno.EDQUOT: "your disk quota is used up: free some room and run again",
            errno.ENOENT: "is it there, on every machine that works on it?",
            errno.EACCES: "check its permissions",
            errno.EPERM: "check its permissions",
            errno.EIO: "the disk fails: check it, and then the store with mobilesam inspect STORE --check",
            errno.EMFILE: "raise the limit of open files (ulimit -n)",
            errno.EROFS: "choose a folder on a writable file system",
        }.get(error.errno or 0, "check the disk and run again")
        raise StoreError(f"{error.filename or path}: {error.strerror or error}; {mend}") from error
