"""Store layout: shards, slots and bytes of rows, and places of files. Pure arithmetic, no I/O.

A shard file is what the Zarr v3 codec `sharding_indexed` defines with its index at the end: inner chunks (one
row each, followed by the row's checksum, a crc32c), then one pair (offset, bytes) of little-endian uint64 per slot,
then the index's own crc32c. A slot without a row holds 2**64 - 1 twice. Inner chunks start at multiples of
`ALIGNMENT`.
Source: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.errors import StoreError
from .checksum import CHECKSUM_BYTES, crc32c

ALIGNMENT = 4096
"""Bytes; O_DIRECT needs file offsets at multiples of the device's block size, at most 4096 in practice."""

PRIVATE = Path("embeddings") / "mobilesam"
"""Folder of mobilesam's own files; inside an array's folder, where Zarr readers don't look."""

MANIFEST = PRIVATE / "manifest.sqlite"
HEAD = PRIVATE / "sam_head.safetensors"

CHANNELS = 256
"""Channels of SAM's image embeddings."""
EMPTY = np.uint64(2**64 - 1)
"""Offset, and length, in the index of a slot without a row."""
PIXELS_PER_CELL = 16
"""Side, in input pixels, of the square that one cell of the embedding's grid covers."""


def shard_of(row: int, shard_size: int) -> int:
    """Return the number of the shard that holds a row.

    Args:
        row: number of the row, from 0.
        shard_size: rows of a full shard.
    """
    return row // shard_size


def rows_of(shard: int, shard_size: int, rows: int) -> range:
    """Return the rows of a shard.

    Args:
        shard: number of the shard, from 0.
        shard_size: rows of a full shard.
        rows: rows of the store.

    Returns:
        Range of `shard_size` rows; fewer in the store's last shard.
    """
    return range(shard * shard_size, min((shard + 1) * shard_size, rows))


def shard_count(rows: int, shard_size: int) -> int:
    """Return the number of shards of a store.

    Args:
        rows: rows of the store.
        shard_size: rows of a full shard.
    """
    return math.ceil(rows / shard_size)


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """One array of the store: one item per row, `shard_size` rows per file."""

    name: str
    """Name of the array and of its folder in the store."""
    item_shape: tuple[int, ...]
    """Shape of one row."""
    dtype: np.dtype
    shard_size: int

    @property
    def payload_bytes(self) -> int:
        """Bytes of one row without its checksum."""
        return math.prod(self.item_shape) * self.dtype.itemsize

    @property
    def stride(self) -> int:
        """Bytes from the start of one row in a shard file to the start of the next."""
        return math.ceil((self.payload_bytes + CHECKSUM_BYTES) / ALIGNMENT) * ALIGNMENT

    @property
    def index_bytes(self) -> int:
        """Bytes of the index at the end of a shard file, its checksum included."""
        return 16 * self.shard_size + CHECKSUM_BYTES

    def file_bytes(self, slots: int) -> int:
        """Return the length in bytes of a shard file in which `slots` slots are in use."""
        return slots * self.stride + self.index_bytes

    def file_name(self, shard: int) -> str:
        """Return the shard's file name inside the array's folder (Zarr's default key encoding, separator '.')."""
        return ".".join(["c", str(shard), *("0" for _ in self.item_shape)])

    def encode_index(self, present: Iterable[int]) -> bytes:
        """Return the index of a shard file whose slots `present` hold a row at slot x stride."""
        entries = np.full((self.shard_size, 2), EMPTY, dtype="<u8")
        for slot in present:
            entries[slot] = slot * self.stride, self.payload_bytes + CHECKSUM_BYTES
        body = entries.tobytes()
        return body + crc32c(body).to_bytes(CHECKSUM_BYTES, "little")

    def decode_index(self, data: bytes) -> np.ndarray:
        """Return the index as uint64 (shard_size, 2) of (offset, bytes); ValueError when its checksum is wrong."""
        body, stored = data[:-CHECKSUM_BYTES], int.from_bytes(data[-CHECKSUM_BYTES:], "little")
        if len(data) != self.index_bytes or crc32c(body) != stored:
            raise ValueError(f"{self.name}: the shard index's checksum is wrong")
        return np.frombuffer(body, dtype="<u8").reshape(self.shard_size, 2)


def array_layouts(dtype: str, image_size: int, shard_size: int) -> tuple[ArrayLayout, ...]:
    """Return the layouts of a store's arrays: `embeddings`, and `scales` too if embeddings are int8.

    Args:
        dtype: one of `DTYPES`.
        image_size: side of the encoder's square in pixels.
        shard_size: rows of a full shard.
    """
    grid = image_size // PIXELS_PER_CELL
    embeddings = ArrayLayout(
        name="embeddings",
        item_shape=(CHANNELS, grid, grid),
        dtype=np.dtype(dtype).newbyteorder("<"),
        shard_size=shard_size,
    )
    if dtype != "int8":
        return (embeddings,)
    scales = ArrayLayout(name="scales", item_shape=(CHANNELS,), dtype=np.dtype("<f4"), shard_size=shard_size)
    return embeddings, scales


def local_path(path: Path | str) -> Path:
    """Return the path as a Path; StoreError for a URL, since stores are local folders."""
    # Path has already turned s3://bucket into s3:/bucket.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise StoreError(
            f"{path}: stores on object storage are not supported yet; give a folder, or mount it"
        )
    return Path(path)
