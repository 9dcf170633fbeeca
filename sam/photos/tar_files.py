"""Tars of images, read in place and never extracted: a scan records the offset of each member's bytes."""

from __future__ import annotations

import os
import re
import tarfile
from dataclasses import dataclass
from io import BufferedReader

from .file_kinds import HEAD_BYTES, TAR_SUFFIX, content_kind

DECOMPRESS = "a compressed tar can't be read in place: decompress it to a .tar, or extract it to a folder"

_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
_BLOCK = tarfile.BLOCKSIZE
_ZEROS_READ = 1 << 20
"""Bytes that are read at a time to find the end of a run of zeros."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TarMember:
    """Regular file inside a tar: `size` bytes of the tar, beginning at byte `offset`."""

    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class TarContents:
    """Members of one tar."""

    members: dict[str, TarMember]
    """Regular files by name, without a leading "./", otherwise verbatim: "../x" and "/x" are ordinary names."""
    unusable: tuple[str, ...]
    """Names of links and sparse files, whose content is not stored in one piece."""
    problem: str | None
    """Reason why the tar could not be read to its end; `members` then has the complete ones before that. None if it
    could."""


def scan_tar(path: str) -> TarContents:
    """Read a tar's headers. Of members with the same name the last one counts, as in extraction.

    Tars that were joined (`cat a.tar b.tar`) are read one after the other.

    Args:
        path: path of the tar.

    Returns:
        The tar's members; if it is damaged, truncated or compressed, `problem` says so.

    Raises:
        OSError: the file can't be read.
    """
    members: dict[str, TarMember] = {}
    unusable: dict[str, None] = {}
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        if file.peek(8).startswith(_COMPRESSED_MAGIC):
            return TarContents(members={}, unusable=(), problem=DECOMPRESS)
        problem: str | None = None
        start: int | None = 0
        try:
            while problem is None and start is not None:
                file.seek(start)
                problem = _scan(file, total, members, unusable)
                start = _next_tar(file, file.tell())
        except (tarfile.TarError, ValueError) as error:
            file.seek(0)
            kind = None if members else content_kind(file.read(HEAD_BYTES))
            problem = (
                f"damaged or truncated ({total:,} bytes): {error}" if kind is None else f"no tar, but {kind}"
            )
    return TarContents(members=members, unusable=tuple(unusable), problem=problem)


def split_tar_key(root: str | os.PathLike[str], key: str) -> tuple[str, str] | None:
    """Split a key such as "a/b.tar/c.jpg" into the tar and the member's name.

    The first prefix that is a regular file is the tar, so a name inside the tar is never used as a path on disk.

    Args:
        root: image root that the key is relative to.
        key: key of an image.

    Returns:
        Path of the tar on disk, and the member's name in it; None if the key leads through no existing tar.
    """
    parts = key.split("/")
    for count in range(1, len(parts)):
        if parts[count - 1].lower().endswith(TAR_SUFFIX):
            path = path_of(root, "/".join(parts[:count]))
            if os.path.isfile(path):
                return path, "/".join(parts[count:])
    return None


def path_of(root: str | os.PathLike[str], key: str) -> str:
    """Return the path on disk of a key that is no tar's member.

    Keys of images beside an absolute root begin with "../". They go up by the names in the root's path, whether or
    not the root exists or is a link.

    Args:
        root: image root that the key is relative to.
        key: key of an image or a tar; below a relative root any path.
    """
    folder = os.fspath(root)
    while key.startswith("../") and os.path.isabs(folder):
        folder, key = os.path.dirname(folder), key[3:]
    return os.path.join(folder, key)


def place_on_disk(root: str | os.PathLike[str], key: str) -> str:
    """Return the path of the file that holds an image: its tar if the key leads through one, else its own.

    Args:
        root: image root that the key is relative to.
        key: key of an image.
    """
    found = split_tar_key(root, key)
    return path_of(root, key) if found is None else found[0]


def _scan(
    file: BufferedReader, total: int, members: dict[str, TarMember], unusable: dict[str, None]
) -> str | None:
    """Fill `members` and `unusable` from the tar that begins at the file's position, and leave that at its end.

    Returns:
        The problem that ended the scan, if any.
    """
    # The encoding is given since the default depends on the locale, and keys must not.
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps every header in memory
            name = re.sub(r"^(\./+)+", "", member.name)
            members.pop(name, None)
            unusable.pop(name, None)
            if member.issym() or member.islnk() or member.issparse():
                unusable[name] = None
            elif member.isreg():
                end = member.offset_data + member.size
                if end > total:
                    return f"truncated: {name!r} ends at byte {end:,}, the tar has {total:,}"
                members[name] = TarMember(offset=member.offset_data, size=member.size)
        file.seek(tar.offset)
        return _check_end(file.read(_BLOCK), tar.offset)


def _check_end(block: bytes, offset: int) -> str | None:
    """Return the problem with a tar's end, if any. The end is a block of zeros, but `tarfile` also stops silently at
    a damaged header."""
    if block == bytes(_BLOCK):
        return None
    if not block:
        return f"no end-of-archive mark after {offset:,} bytes: it may be truncated"
    return f"damaged or truncated: no valid header at byte {offset:,}"


def _next_tar(file: BufferedReader, start: int) -> int | None:
    """Return the place of the first block after the zeros that end a tar; None if the file ends with them."""
    file.seek(start)
    while block := file.read(_ZEROS_READ):
        if stripped := block.lstrip(b"\0"):
            found = start + len(block) - len(stripped)
            return found - found % _BLOCK
        start += len(block)
    return None
