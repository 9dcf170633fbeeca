"""Kept images: resized images beside their embeddings, one tar a shard, which any tar program opens.

A member is an image file, named by its row. Its encoding is its writer's business; here it is bytes, verified by the
checksum that the manifest lists.
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
"""Bytes of a tar's block: a header is one block, and a member's content is padded to whole blocks."""

END = bytes(2 * BLOCK)
"""Last bytes of a tar."""


def tar_path(store: Path, shard: int) -> Path:
    """Return the path of a shard's images."""
    return store / FOLDER / f"{shard}.tar"


def partial_tar_path(store: Path, shard: int, attempt: str) -> Path:
    """Return the path at which one attempt at a shard writes its images before it is committed."""
    return store / FOLDER / f"{shard}.tar.{attempt}.partial"


def header(row: int, kind: str, size: int) -> bytes:
    """Return the block before a member of `size` bytes: the same for equal rows, whoever writes it, and when."""
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
        path: of the tar.
        key: of the image, for messages.
        row: of the image, for messages.
        kept: place and checksum, as the manifest lists them.

    Raises:
        StoreDamaged: the bytes aren't those that were committed.
        OSError: the tar can't be read.
    """
    with open(path, "rb", buffering=0) as tar:
        data = os.pread(tar.fileno(), kept.bytes, kept.offset)
    if len(data) != kept.bytes or crc32c(data) != kept.crc32c:
        raise StoreDamaged(
            f"{path}, row {row} ({key!r}): the image kept there is not the one that was committed; {REPAIR_SHARDS}"
        )
    return data
