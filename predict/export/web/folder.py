"""Folder of the web demo: recognition by its demo.json, replacement of an older one. Without torch, for `demo`."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....common.durable import explain_os_errors, fsync_directory
from ....common.errors import PredictError, counted, shown
from ....common.outputs import read_mark
from ...outputs import EXPORT, check_writable, read_description

FORMAT = "mobilesam web 1"
DESCRIPTION_FILE = "demo.json"
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}
"""Headers with which a browser allows threads that share memory."""


def read_demo(folder: Path) -> dict[str, Any] | None:
    """Return a demo's demo.json; None if the folder holds none of this format."""
    description = read_description(folder / DESCRIPTION_FILE, FORMAT)
    listing = None if description is None else description.get("listing")
    # Paths that lead out of the folder are nobody's demo.
    good = isinstance(listing, dict) and not any(".." in name or name.startswith("/") for name in listing)
    return description if good else None


def check_demo_folder(folder: Path) -> None:
    """Refuse a folder that can't be replaced: it can't be written, or holds anything other than an older demo.

    Args:
        folder: folder to be written later; may not exist.

    Raises:
        PredictError: the folder is refused; the message gives the reason, or the first of the other files.
    """
    folder = folder.absolute()
    if not folder.exists():
        if folder.is_symlink():
            raise PredictError(f"--out {shown(str(folder))} is a link to nothing: give another name")
        check_writable(folder.parent, "--out")
        return
    if not folder.is_dir():
        raise PredictError(
            f"--out {shown(str(folder))} is a file: the web demo is a folder, give another name"
        )
    check_writable(folder.resolve().parent, "--out")
    description = read_demo(folder)
    with explain_os_errors(folder, PredictError, "--out"):
        # Only a demo is searched through: another folder may hold a whole disk.
        paths = folder.iterdir() if description is None else folder.rglob("*")
        found = [
            path.relative_to(folder).as_posix() for path in paths if description is None or not path.is_dir()
        ]
    listing = {} if description is None else {**description["listing"], DESCRIPTION_FILE: None}
    others = sorted(set(found) - set(listing))
    if others:
        raise PredictError(
            f"{shown(str(folder))} holds {counted(len(others), 'file')} that no web demo has, such as "
            f"{shown(others[0])}: give a new folder"
        )
    for name in sorted(found):
        if not _as_written(folder / name, listing[name]):
            raise PredictError(
                f"{shown(str(folder / name))} was changed since mobilesam exported it, or is damaged: give --out a "
                "new folder, or delete that file first"
            )


def _as_written(path: Path, sha256: str | None) -> bool:
    with explain_os_errors(path, PredictError):
        if sha256 is None:
            mark = read_mark(path)
            return mark is not None and mark.kind == EXPORT and mark.intact
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def write_demo_folder(folder: Path, content: Mapping[str, bytes]) -> None:
    """Write a web demo, and replace an older one by it as a whole.

    The new folder is made beside its final place, and both are renamed. After a kill the older demo is whole, at its
    place or in a hidden folder beside it.

    Args:
        folder: folder that passed `check_demo_folder`.
        content: content by path, `DESCRIPTION_FILE` among them.

    Raises:
        PredictError: a file can't be written, or the folder was filled meanwhile.
    """
    folder = folder.resolve()
    attempt = uuid.uuid4().hex[:8]
    new = folder.with_name(f".{folder.name}.{attempt}.partial")
    old = folder.with_name(f".{folder.name}.{attempt}.old")
    with explain_os_errors(folder, PredictError, "--out"):
        try:
            for path, data in content.items():
                place = new / path
                place.parent.mkdir(parents=True, exist_ok=True)
                with open(place, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            check_demo_folder(folder)
            if folder.exists():
                os.rename(folder, old)
            os.rename(new, folder)
            fsync_directory(folder.parent)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            if old.exists() and not folder.exists():
                os.rename(old, folder)
            raise
        if old.exists():
            shutil.rmtree(old)
