"""Reading one image's bytes, by the key it was listed under."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .errors import ImageError
from .sources import shown
from .tars import split_tar_key

MAX_BYTES = 2_000_000_000
"""Largest file that is read, in bytes: no image that is small enough to be decoded is larger, and reading a file of
any length would let one stray file take all memory."""


def read_image(root: Path | str, key: str, *, offset: int | None = None, size: int | None = None) -> bytes:
    """Read an image: a file below `root` or, with `offset` and `size`, a tar's member in place.

    Raises ImageError, with a one-line reason that leaves out the key, where the file or tar is missing or can't be
    read, or where there are not the `size` bytes that were listed.
    """
    if offset is not None:
        if size is None:
            raise ValueError("a tar's member is read by offset and size")
        return _read_member(root, key, offset, size)
    try:
        with open(Path(root, key), "rb", buffering=0) as file:
            _refuse_huge(os.fstat(file.fileno()).st_size)
            data = file.readall()
    except FileNotFoundError as error:
        raise ImageError("the file is missing") from error
    except OSError as error:
        raise ImageError(f"the file can't be read: {error.strerror}") from error
    if size is not None and len(data) != size:
        raise ImageError(f"the file was listed with {size:,} bytes and has {len(data):,}")
    return data


def read_checked(
    root: Path | str, key: str, offset: int | None, size: int, sha256: str | None = None
) -> bytes:
    """Read an image that a store has an embedding of: its length must be `size` and its SHA-256 `sha256` (hex).

    With None the SHA-256 is not checked. Raises ImageError, naming the key, if the image is gone or has changed.
    """
    mend = "put the original back, or precompute into a new store"
    try:
        data = read_image(root, key, offset=offset, size=None if offset is None else size)
    except ImageError as error:
        raise ImageError(f"{shown(key)}: {error}\n{mend}") from error
    changed = f"{shown(key)} changed since precompute"
    if len(data) != size:
        raise ImageError(f"{changed}: {size:,} bytes then, {len(data):,} now\n{mend}")
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ImageError(f"{changed}: SHA-256 {sha256[:12]}... then, {found[:12]}... now\n{mend}")
    return data


def _read_member(root: Path | str, key: str, offset: int, size: int) -> bytes:
    found = split_tar_key(root, key)
    if found is None:
        raise ImageError("its tar is missing")
    _refuse_huge(size)
    try:
        with open(found[0], "rb", buffering=0) as tar:
            data = os.pread(tar.fileno(), size, offset)
            tar_size = os.fstat(tar.fileno()).st_size
    except OSError as error:
        raise ImageError(f"its tar can't be read: {error.strerror}") from error
    if len(data) != size:
        raise ImageError(
            f"its tar was cut or replaced: the image ends at byte {offset + size:,} of {tar_size:,}"
        )
    return data


def _refuse_huge(size: int) -> None:
    if size > MAX_BYTES:
        raise ImageError(f"too large: {size:,} bytes, the limit is {MAX_BYTES:,}")
