"""Image files: listed from folders and tars below one root, and read by the keys of that listing.

Tars are read in place and never extracted: a listing records the offset of each member's bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from ..common.errors import ImageError as ImageError
from ..common.errors import SamError as SamError
from ..common.errors import shown
from ..common.image_ref import ImageRef as ImageRef

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Suffixes of image files, in upper or lower case; the format is recognised later, by the content."""

TAR_SUFFIX = ".tar"
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
DECOMPRESS = "a compressed tar can't be read in place: decompress it to a .tar, or extract it to a folder"

MAX_BYTES = 2_000_000_000
"""Largest file that is read, in bytes. Images small enough to be decoded are never larger; without a limit, one stray
file could take all memory."""

_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """File or folder that could not be listed."""

    path: str
    reason: str
    """One line, without the path."""

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images found by `list_images`, and files that it skipped."""

    root: Path
    """Absolute path of the folder that keys are relative to."""
    files: tuple[ImageRef, ...]
    """Images sorted by the bytes of their keys, which are unique."""
    problems: tuple[Problem, ...]
    """Folders and tars that could not be read, or not to their end, and broken links; to be shown to the user."""
    others: int
    """Number of files skipped because they have no image suffix (such as SA-1B's .json files)."""
    hidden: int
    """Number of files and folders skipped because their name begins with a dot."""


def list_images(paths: Sequence[Path | str], root: Path | str | None = None) -> ImageSet:
    """Find the images in folders (searched recursively) and .tar files.

    Symbolic links are followed, but a folder that is reached twice is listed once, under its own path rather than a
    link's. So loops of links end, and a link such as `latest` duplicates nothing. Names that begin with a dot are
    skipped.

    Args:
        paths: folders and .tar files, in any mixture and order.
        root: folder that keys are relative to; None for the one folder, the folder of the one tar, or the deepest
            folder that contains all of `paths`.

    Returns:
        The images, sorted by key, and what was skipped.

    Raises:
        SamError: a path is absent, unreadable, of another kind or outside `root`, or no image is found.
    """
    tops = sorted({_absolute(path) for path in paths}, key=os.fsencode)
    if not tops:
        raise SamError("no images: name a folder or a .tar file")
    for top in tops:
        _check_top(top)
    folders = [top if os.path.isdir(top) else os.path.dirname(top) for top in tops]
    base = os.path.commonpath(folders) if root is None else _absolute(root)
    listing = _Listing()
    for top in tops:
        listing.add(top, _key_below(base, top))
    listing.follow_links()
    if not listing.files:
        raise SamError(_nothing_found(tops, listing))
    listing.files.sort(key=lambda file: os.fsencode(file.key))
    return ImageSet(
        root=Path(base),
        files=tuple(listing.files),
        problems=tuple(sorted(listing.problems, key=lambda problem: os.fsencode(problem.path))),
        others=listing.others,
        hidden=listing.hidden,
    )


def read_image(root: Path | str, key: str, *, offset: int | None = None, size: int | None = None) -> bytes:
    """Read the bytes of an image: a file below `root`, or a tar's member in place.

    Args:
        root: image root that the key is relative to.
        key: key of the image, as `list_images` returns it.
        offset: byte of the tar at which the member's content begins; None for a file that is not in a tar.
        size: length in bytes as listed, which is checked; None to accept any. Required for a tar's member.

    Returns:
        Content of the image file.

    Raises:
        ImageError: the file or tar is missing, can't be read, or has another length than listed. The message is a
            one-line reason without the key.
        ValueError: `offset` without `size`.
    """
    if offset is not None:
        if size is None:
            raise ValueError("a tar's member needs both offset and size")
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
    """Read an image that a store has an embedding of, and check that it has not changed since.

    Args:
        root: image root that the key is relative to.
        key: key of the image, from the manifest.
        offset: byte of the tar at which the member's content begins; None for a file that is not in a tar.
        size: length in bytes that the file must have.
        sha256: hex SHA-256 that it must have; None to skip that check.

    Returns:
        Content of the image file.

    Raises:
        ImageError: the image is missing or has changed; the message names the key.
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


def in_fraction(key: str, fraction: float, seed: int) -> bool:
    """Return True if an image belongs to a pseudorandom fraction of the images.

    The result depends only on the three arguments: it is the same on every machine, stable when images are added,
    and nested (an image in fraction 0.1 is also in 0.2).

    Args:
        key: key of the image.
        fraction: share of the images, above 0 and at most 1.
        seed: seed of the choice.

    Raises:
        ValueError: `fraction` is out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, not {fraction}")
    digest = hashlib.sha256(f"{seed}\0".encode() + key.encode("utf-8", "surrogateescape")).digest()
    # Exact: a power of two changes only the exponent, and Python compares int with float exactly. 1 keeps all.
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


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
        try:
            problem = _scan(file, total, members, unusable)
        except (tarfile.TarError, ValueError) as error:
            problem = f"damaged or truncated ({total:,} bytes): {error}"
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
            path = os.path.join(root, *parts[:count])
            if os.path.isfile(path):
                return path, "/".join(parts[count:])
    return None


class _Listing:
    """Images found so far. Linked folders are walked after all others, so that real paths come first."""

    def __init__(self) -> None:
        self.files: list[ImageRef] = []
        self.problems: list[Problem] = []
        self.others = 0
        self.hidden = 0
        self._links: list[tuple[str, str]] = []
        self._seen: set[tuple[int, int]] = set()
        self._tars: set[str] = set()

    def add(self, path: str, key: str) -> None:
        """List a folder or a tar; its key is "" if it is the root itself."""
        if os.path.isdir(path):
            self._walk(path, key)
        else:
            self._add_tar(path, key)

    def follow_links(self) -> None:
        """Walk the linked folders, and those linked from there."""
        while self._links:
            links = sorted(self._links, key=lambda link: os.fsencode(link[1]))
            self._links = []
            for path, key in links:
                self._walk(path, key)

    def _walk(self, top: str, top_key: str) -> None:
        folders = [(top, top_key)]
        while folders:
            path, key = folders.pop()
            try:
                stat = os.stat(path)
                if (stat.st_dev, stat.st_ino) in self._seen:
                    continue
                self._seen.add((stat.st_dev, stat.st_ino))
                with os.scandir(path) as scan:
                    entries = list(scan)
            except OSError as error:
                self.problems.append(Problem(path=path, reason=f"folder can't be read: {error.strerror}"))
                continue
            for entry in entries:
                entry_key = f"{key}/{entry.name}" if key else entry.name
                if self._add_entry(entry, entry_key):
                    folders.append((entry.path, entry_key))

    def _add_entry(self, entry: os.DirEntry[str], key: str) -> bool:
        """List one entry of a folder; return True if it is a folder to walk now."""
        name = entry.name.lower()
        try:
            if name.startswith("."):
                self.hidden += 1
            elif entry.is_dir():
                if not entry.is_symlink():
                    return True
                self._links.append((entry.path, key))
            elif not name.endswith((*IMAGE_SUFFIXES, TAR_SUFFIX, *COMPRESSED_SUFFIXES)):
                self.others += 1
            elif not entry.is_file():
                what = "broken link" if entry.is_symlink() else "not a regular file"
                self.problems.append(Problem(path=entry.path, reason=what))
            elif name.endswith(IMAGE_SUFFIXES):
                self.files.append(ImageRef(key=key, size=entry.stat().st_size, offset=None))
            elif name.endswith(TAR_SUFFIX):
                self._add_tar(entry.path, key)
            else:
                self.problems.append(Problem(path=entry.path, reason=DECOMPRESS))
        except OSError as error:
            self.problems.append(Problem(path=entry.path, reason=f"can't be read: {error.strerror}"))
        return False

    def _add_tar(self, path: str, key: str) -> None:
        if path in self._tars:
            return
        self._tars.add(path)
        try:
            contents = scan_tar(path)
        except OSError as error:
            self.problems.append(Problem(path=path, reason=f"tar can't be read: {error.strerror}"))
            return
        for name, member in contents.members.items():
            if _is_hidden(name):
                self.hidden += 1
            elif name.lower().endswith(IMAGE_SUFFIXES):
                self.files.append(ImageRef(key=f"{key}/{name}", size=member.size, offset=member.offset))
            else:
                self.others += 1
        if contents.problem is not None:
            self.problems.append(Problem(path=path, reason=contents.problem))
        for name in contents.unusable:
            if name.lower().endswith(IMAGE_SUFFIXES) and not _is_hidden(name):
                reason = "a link or sparse file in a tar can't be read in place: extract the tar to a folder"
                self.problems.append(Problem(path=f"{path}/{name}", reason=reason))


def _is_hidden(name: str) -> bool:
    """Return True if a tar member's name, or that of a folder in its path, begins with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _absolute(path: Path | str) -> str:
    # abspath keeps the user's name of a linked folder, but resolves ".." after a link wrongly.
    path = os.fspath(path)
    return os.path.realpath(path) if ".." in path.split(os.sep) else os.path.abspath(path)


def _check_top(path: str) -> None:
    """Raise SamError unless the path is a readable folder or .tar file."""
    try:
        if os.path.isdir(path):
            os.scandir(path).close()
            return
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise SamError(f"no such folder or tar: {shown(path)}") from None
    except OSError as error:
        raise SamError(f"{shown(path)} can't be read: {error.strerror}") from error
    if path.lower().endswith(COMPRESSED_SUFFIXES):
        raise SamError(f"{shown(path)}: {DECOMPRESS}")
    if not path.lower().endswith(TAR_SUFFIX):
        raise SamError(f"{shown(path)} is neither a folder nor a .tar file: name the folder that holds it")


def _key_below(base: str, path: str) -> str:
    if path == base:
        return ""
    prefix = base.rstrip("/") + "/"
    if not path.startswith(prefix):
        raise SamError(f"{shown(path)} lies outside the image root {shown(base)}: name a path below it")
    return path[len(prefix) :]


def _nothing_found(tops: Sequence[str], listing: _Listing) -> str:
    where = shown(tops[0]) + (f" and {len(tops) - 1} more" if len(tops) > 1 else "")
    kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
    message = f"no images in {where} ({kinds}): {listing.others:,} other files"
    if listing.hidden:
        message += f", {listing.hidden:,} hidden ones"
    if listing.problems:
        message += f"\n{len(listing.problems):,} problems, the first: {listing.problems[0]}"
    return message


def _scan(
    file: BufferedReader, total: int, members: dict[str, TarMember], unusable: dict[str, None]
) -> str | None:
    """Fill `members` and `unusable` from a tar of `total` bytes; return the problem that ended the scan, if any."""
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
            f"its tar was truncated or replaced: the image ends at byte {offset + size:,} of {tar_size:,}"
        )
    return data


def _refuse_huge(size: int) -> None:
    if size > MAX_BYTES:
        raise ImageError(f"too large: {size:,} bytes, the limit is {MAX_BYTES:,}")
