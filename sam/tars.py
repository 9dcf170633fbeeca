"""Tars read in place: where each member's bytes lie. Nothing is ever extracted."""

from __future__ import annotations

import os
import re
import tarfile
from dataclasses import dataclass
from io import BufferedReader

TAR_SUFFIX = ".tar"
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
DECOMPRESS = "a compressed tar can't be read in place: decompress it to a .tar, or extract it to a folder"

_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True, slots=True)
class TarMember:
    """A regular file inside a tar: its bytes are `size` bytes of the tar from `offset` on."""

    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class TarContents:
    """What one tar holds."""

    members: dict[str, TarMember]
    """By name without a leading "./"; otherwise verbatim, so "../x" and "/x" are names like any other."""
    unusable: tuple[str, ...]
    """Names of links and sparse files: their bytes don't lie in the tar in one piece."""
    problem: str | None
    """Why the tar could not be read to its end; `members` then holds what is whole before that."""


def scan_tar(path: str) -> TarContents:
    """Read a tar's headers. Of members with one name the last counts, as when extracting. Raises OSError."""
    members: dict[str, TarMember] = {}
    unusable: dict[str, None] = {}
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        if file.peek(8).startswith(_COMPRESSED_MAGIC):
            return TarContents(members={}, unusable=(), problem=DECOMPRESS)
        try:
            problem = _scan(file, total, members, unusable)
        except (tarfile.TarError, ValueError) as error:
            problem = f"damaged or cut short, it has {total:,} bytes: {error}"
    return TarContents(members=members, unusable=tuple(unusable), problem=problem)


def _scan(
    file: BufferedReader, total: int, members: dict[str, TarMember], unusable: dict[str, None]
) -> str | None:
    # The encoding is stated because the default follows the locale, and keys must not.
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else a tar keeps every header it ever read
            name = re.sub(r"^(\./+)+", "", member.name)
            members.pop(name, None)
            unusable.pop(name, None)
            if member.issym() or member.islnk() or member.issparse():
                unusable[name] = None
            elif member.isreg():
                end = member.offset_data + member.size
                if end > total:
                    return f"cut short: {name!r} ends at byte {end:,}, the tar has {total:,}"
                members[name] = TarMember(offset=member.offset_data, size=member.size)
        file.seek(tar.offset)
        return _check_end(file.read(_BLOCK), tar.offset)


def _check_end(block: bytes, offset: int) -> str | None:
    """`tarfile` takes a damaged header for the end, in silence. A real end is a block of zeros."""
    if block == bytes(_BLOCK):
        return None
    if not block:
        return f"no end-of-archive mark after {offset:,} bytes: it may be cut short"
    return f"damaged or cut short: no valid header at byte {offset:,}"


def split_tar_key(root: str | os.PathLike[str], key: str) -> tuple[str, str] | None:
    """Split "a/b.tar/c.jpg" into the tar's path on disk and the member's name; None if there is no such tar.

    The first prefix that is a regular file is the tar, so no name inside it is ever taken for a path.
    """
    parts = key.split("/")
    for count in range(1, len(parts)):
        if parts[count - 1].lower().endswith(TAR_SUFFIX):
            path = os.path.join(root, *parts[:count])
            if os.path.isfile(path):
                return path, "/".join(parts[count:])
    return None
