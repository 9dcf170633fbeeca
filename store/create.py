"""Draft of a new store: made in a folder beside the store's path and renamed to it once it is complete."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..common.durable import explain_os_errors, fsync_directory, make_folder
from ..common.errors import StoreError, StoreLocked
from .layout import MANIFEST, PRIVATE
from .lock import WriterLock

_DRAFT_NAME = re.compile(r"\.[0-9a-f]{8}\.partial")


def refuse_taken(path: Path) -> None:
    """Raise StoreError unless nothing is at `path`, or an empty folder (or a link to one)."""
    if not path.name or path.name == "..":
        raise StoreError(
            f"{path} can't become a store: name a folder of its own, as in {path / 'store.zarr'}"
        )
    with explain_os_errors(path):
        if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
            return
    if (path / MANIFEST).exists():
        raise StoreError(f"{path} holds a store already: resume it, or give another --out")
    if path.is_symlink() and not path.exists():
        raise StoreError(
            f"{path} is a link to {path.readlink()}, which does not exist: make that folder first"
        )
    raise StoreError(f"{path} exists and is no mobilesam store: give another --out, or remove it")


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Make a locked folder for a new store; it is moved to `path` when the context ends normally, else removed.

    Drafts that killed processes left are removed first.

    Raises:
        StoreError: something is at the path, before the context or at its end, or the folder can't be written.
    """
    refuse_taken(path)
    # A link stays a link: the store is made on the disk that it points to.
    place = Path(os.path.realpath(path))
    with explain_os_errors(path):
        make_folder(place.parent)
        _remove_abandoned(place)
        draft = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}.partial")
        (draft / PRIVATE).mkdir(parents=True)
    lock = WriterLock(draft / PRIVATE)
    try:
        lock.acquire()
        with explain_os_errors(path):
            yield draft
            lock.forget_owner()
            _move_into_place(draft, place, path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        lock.release()


def _remove_abandoned(place: Path) -> None:
    """Remove drafts that killed processes left beside the store's path. Files with other names are not ours."""
    for draft in place.parent.iterdir():
        if not draft.name.startswith(place.name) or not _DRAFT_NAME.fullmatch(draft.name[len(place.name) :]):
            continue
        if not (draft / PRIVATE).is_dir():
            _remove_empty(draft)
            continue
        lock = WriterLock(draft / PRIVATE)
        try:
            lock.acquire()
        except StoreLocked:
            continue
        except StoreError:
            pass
        shutil.rmtree(draft, ignore_errors=True)
        lock.release()


def _remove_empty(draft: Path) -> None:
    """Remove a draft whose process was killed before it had made all its folders, unless it holds anything."""
    with suppress(OSError):
        for folder in (draft / PRIVATE).parents:
            if folder == draft.parent:
                break
            if folder.exists():
                folder.rmdir()


def _move_into_place(draft: Path, place: Path, path: Path) -> None:
    try:
        os.rename(draft, place)
    except OSError:
        refuse_taken(path)  # something may have been made there meanwhile
        raise
    fsync_directory(place.parent)
