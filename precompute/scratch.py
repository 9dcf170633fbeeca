"""A folder for what workers keep on disk while a run lasts; those of runs that were killed are removed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "mobilesam-"
_UNREADY = ".mobilesam-"
_LOCK = "coordinator.lock"


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A new folder in the system's place for temporary files, removed at the context's end.

    While its process lives, it holds a lock on a file in it, which the kernel lets go of when it dies, however it
    dies: by that an abandoned folder is known, and removed here first.
    """
    place = Path(tempfile.gettempdir())
    _remove_abandoned(place)
    # Nobody looks at the folder under this name: it gets its own once the lock is held.
    folder = Path(tempfile.mkdtemp(prefix=_UNREADY))
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = folder.rename(place / f"{_PREFIX}{folder.name.removeprefix(_UNREADY)}")
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _remove_abandoned(place: Path) -> None:
    """Only this user's own real folders with our lock file in them, and only once the lock is ours; whatever can't be
    had or removed is left: it is in nobody's way."""
    for folder in place.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
