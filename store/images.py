"""Resized images kept beside their embeddings: one tar a shard, which any tar program opens.

A member is an image file, named by its row. What it is encoded as is its maker's affair; here it is bytes, proved by
the checksum that the manifest lists.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from ..common.errors import REPAIR_SHARDS, StoreDamaged
from .layout import PRIVATE, crc32c
from .records import KeptImage

FOLDER = PRIVATE / "images"
BLOCK = tarfile.BLOCKSIZE
"""Bytes; a tar's headers are one block each, and what they head is filled up to whole blocks."""

END = bytes(2 * BLOCK)
"""What ends a tar."""


def tar_path(store: Path, shard: int) -> Path:
    """Where a shard's images lie."""
    return store / FOLDER / f"{shard}.tar"


def partial_tar_path(store: Path, shard: int, attempt: str) -> Path:
    """Where one attempt at them is written before it is committed."""
    return store / FOLDER / f"{shard}.tar.{attempt}.partial"


def header(row: int, kind: str, size: int) -> bytes:
    """The block before a member of `size` bytes: the same for equal rows, whoever writes it, and when."""
    member = tarfile.TarInfo(f"{row:012d}.{kind}")
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int) -> int:
    """Bytes that fill up the last block of a member."""
    return -size % BLOCK


def tar_bytes(images: Iterable[KeptImage]) -> int:
    """The length of the tar that holds these."""
    return sum(BLOCK + image.bytes + padding(image.bytes) for image in images) + len(END)


def read_kept(path: Path, key: str, row: int, kept: KeptImage) -> bytes:
    """One image from its tar. StoreDamaged when its bytes aren't those that were committed; OSError."""
    with open(path, "rb", buffering=0) as tar:
        data = os.pread(tar.fileno(), kept.bytes, kept.offset)
    if len(data) != kept.bytes or crc32c(data) != kept.crc32c:
        raise StoreDamaged(
            f"{path}, row {row} ({key!r}): the image kept there is not the one that was committed; {REPAIR_SHARDS}"
        )
    return data
