"""Checksums of what the manifest says: SQLite itself takes a flipped bit in a value for the value."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from .layout import crc32c


def row_digest(fields: tuple) -> int:
    """crc32c of a listed row: its image (row, key, size, offset) and its result's fields.

    Of the fields' Python literals in ASCII: integers, bytes, text and None have one form each.
    """
    return crc32c(ascii(fields).encode("ascii"))


def shard_digest(fields: tuple, rows: Iterable[int]) -> int:
    """crc32c of a listed shard: its own fields, and its rows' digests in row order."""
    return crc32c(ascii((fields, tuple(rows))).encode("ascii"))


class KeysDigest:
    """SHA-256 of a set of images as appended: how it was chosen, then every key in row order."""

    def __init__(self, fields: tuple) -> None:
        self._hash = hashlib.sha256(ascii(fields).encode("ascii"))

    def add(self, key: bytes) -> None:
        """Take in the next row's key."""
        self._hash.update(b"%d:%b" % (len(key), key))

    def value(self) -> bytes:
        """The digest so far, 32 bytes."""
        return self._hash.digest()
