"""Checksums of a store: the crc32c of a row's bytes, and digests of what the manifest says of rows and shards.

A row is handed out only if three crc32c agree (`reader.py`): of the bytes read, of the chunk as it is stored behind
them, and of the row as the manifest lists it. The manifest's own rows carry digests, since SQLite takes a
flipped bit in a value for the value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import google_crc32c
import numpy as np

CHECKSUM_BYTES = 4
"""Bytes of the crc32c behind a row and behind a shard's index."""


def crc32c(data: np.ndarray | bytes) -> int:
    """Return the CRC-32C (Castagnoli) of an array's or a string's bytes, as Zarr's codec `crc32c` stores it."""
    return int(google_crc32c.value(np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data))


def row_digest(fields: tuple) -> int:
    """Return the crc32c of a committed row: its image (row, key, size, offset), then its result's fields.

    It covers the fields' Python literals in ASCII: integers, bytes, text and None have one form each.
    """
    return crc32c(ascii(fields).encode("ascii"))


def shard_digest(fields: tuple, rows: Iterable[int]) -> int:
    """Return the crc32c of a committed shard's entries.

    Args:
        fields: the shard's columns in `shards` (shard, rows, done, failed, attempt).
        rows: `row_digest` of each of its rows, in row order.
    """
    return crc32c(ascii((fields, tuple(rows))).encode("ascii"))


class KeysDigest:
    """SHA-256 of a set of images as appended: the rule that chose it, then every key in row order.

    Args:
        fields: first row, then the columns of `extensions` from fraction to checkpoint.
    """

    def __init__(self, fields: tuple) -> None:
        self._hash = hashlib.sha256(ascii(fields).encode("ascii"))

    def add(self, key: bytes) -> None:
        """Add the next row's key."""
        self._hash.update(b"%d:%b" % (len(key), key))

    def value(self) -> bytes:
        """Return the digest so far, 32 bytes."""
        return self._hash.digest()
