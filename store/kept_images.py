"""Kept images: resized images beside their embeddings, one tar a shard, which any tar program opens.

A member is an image file, named by its row. This module treats it as bytes of any encoding, and verifies it by
the checksum in the manifest.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from ..common.errors import REPAIR_SHARDS, StoreDamaged
from .checksum import crc32c
from .layout import PRIVATE
from .records import KeptImage

FOLDER = PRIVATE / "images"
BLOCK = tarfile.BLOCKSIZE
"""Bytes of a tar's block: a header is one block, and a member's content is padded to whole blocks."""

END = bytes(2 * BLOCK)
"""Last bytes of a tar."""


def tar_path(store: Path, shard: int) -> Path:
    """Return the path of the tar of a committed shard's images.

    Args:
        store: path of the store.
        shard: number of the shard.
    """
    return store / FOLDER / f"{shard}.tar"


def partial_tar_path(store: Path, shard: int, attempt: str) -> Path:
    """Return the path of the tar that one attempt at a shard writes, before the shard is committed.

    Args:
        store: path of the store.
        shard: number of the shard.
        attempt: name of the attempt, unique in the store.
    """
    return store / FOLDER / f"{shard}.tar.{attempt}.partial"


def header(row: int, kind: str, size: int) -> bytes:
    """Make the tar header of one image. It holds no owner and no time: equal arguments give equal bytes.

    Args:
        row: row of the image, which names the member.
        kind: file type of the image, without a dot; the member's suffix.
        size: length of the image file in bytes.

    Returns:
        One block of `BLOCK` bytes.
    """
    member = tarfile.TarInfo(f"{row:012d}.{kind}")
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int) -> int:
    """Return the number of bytes that fill up the last block of a member of `size` bytes."""
    return -size % BLOCK


def tar_bytes(images: Iterable[KeptImage]) -> int:
    """Return the length in bytes of the tar that holds these images."""
    return sum(BLOCK + image.bytes + padding(image.bytes) for image in images) + len(END)


def read_kept(path: Path, key: str, row: int, kept: KeptImage) -> bytes:
    """Read one image from its tar.

    Args:
        path: path of the tar.
        key: key of the image, for messages.
        row: row of the image, for messages.
        kept: offset, length and checksum, from the manifest.

    Raises:
        StoreDamaged: the bytes are not those that were committed.
        OSError: the tar can't be read.
    """
    with open(path, "rb", buffering=0) as tar:
        data = os.pread(tar.fileno(), kept.bytes, kept.offset)
    if len(data) != kept.bytes or crc32c(data) != kept.crc32c:
        raise StoreDamaged(
            f"{path}, row {row} ({key!r}): the kept image is not the one that was committed; {REPAIR_SHARDS}"
        )
    return data
