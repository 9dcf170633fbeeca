"""Image files: listed from folders and tars below one root, and read by the keys of that listing.

Tars are read in place and never extracted: a listing records the offset of each member's bytes.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...common.errors import ImageError as ImageError
from ...common.errors import SamError as SamError
from ...common.errors import counted, shown
from ...common.image_ref import ImageRef as ImageRef
from .file_kinds import (
    COMPRESSED_SUFFIXES,
    HEAD_BYTES,
    TAR_SUFFIX,
    hidden_kind,
    is_image,
    own_folder,
    own_pictures,
    passed_over_line,
    store_around,
)
from .tar_files import DECOMPRESS, path_of, scan_tar, split_tar_key

MAX_BYTES = 2_000_000_000
"""Largest file that is read, in bytes. Images small enough to be decoded are never larger; without a limit, one stray
file could take all memory."""


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
    passed_over: Mapping[str, int]
    """Number of files skipped because they are no images that can be decoded here, by kind (see `file_kinds`), as
    SA-1B's "JSON"; a folder that is skipped as a whole (hidden, or one that mobilesam made) counts as one."""


def list_images(paths: Sequence[Path | str], root: Path | str | None = None) -> ImageSet:
    """Find the images in folders (searched recursively) and .tar files, and take single images.

    Symbolic links are followed, but a folder that is reached twice is listed once, under its own path rather than a
    link's. So loops of links end, and a link such as `latest` duplicates nothing. Names that begin with a dot are
    skipped, and so are stores, runs, sweeps and exports, whatever images they hold.

    Args:
        paths: folders, .tar files and images, in any mixture and order, or patterns as in `photos/*.jpg`.
        root: folder that keys are relative to; None for the one folder, the folder of the one tar or image, or the
            deepest folder that contains all of `paths`. Images outside it have keys that begin with "../".

    Returns:
        The images, sorted by key, and what was skipped.

    Raises:
        SamError: a path is absent, unreadable or no image, or no image is found.
    """
    tops = expand_paths(paths)
    folders = [top if os.path.isdir(top) else os.path.dirname(top) for top in tops]
    base = os.path.commonpath(folders) if root is None else _absolute(root)
    listing = _Listing(base, {top for top in tops if not os.path.isdir(top)})
    for top in tops:
        listing.add(top)
    listing.follow_links()
    if not listing.files:
        raise SamError(_nothing_found(tops, listing))
    listing.files.sort(key=lambda file: os.fsencode(file.key))
    return ImageSet(
        root=Path(base),
        files=tuple(listing.files),
        problems=tuple(sorted(listing.problems, key=lambda problem: os.fsencode(problem.path))),
        passed_over=dict(listing.passed_over),
    )


def expand_paths(paths: Sequence[Path | str]) -> list[str]:
    """Return the absolute paths that `--images` names: patterns replaced by what they match, without repetition.

    Args:
        paths: paths or patterns; a leading ~ is the home folder. A path that exists is never a pattern.

    Raises:
        SamError: there are none, one is absent or can't be read, or a pattern matches nothing.
    """
    found: set[str] = set()
    for given in (os.fspath(path) for path in paths):
        path = given if os.path.lexists(given) else os.path.expanduser(given)
        if os.path.lexists(path) or not glob.has_magic(path):
            found.add(_absolute(path))
            continue
        matches = glob.glob(path, recursive=True)
        if not matches:
            raise SamError(f"no file matches --images {shown(given)}")
        found.update(map(_absolute, matches))
    if not found:
        raise SamError("no images: name a folder, a .tar file or an image")
    for path in found:
        _check_readable(path)
    return sorted(found, key=os.fsencode)


def resolved_folder(path: Path | str) -> Path:
    """Return the absolute path of an image root, given as a folder, or as a tar or an image in it.

    The user's name of a linked folder is kept, since keys of images beside the root go up by that name.
    """
    absolute = Path(_absolute(os.path.expanduser(path) if not os.path.lexists(path) else path))
    return absolute.parent if absolute.is_file() else absolute


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
        with open(path_of(root, key), "rb", buffering=0) as file:
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


class _Listing:
    """Images found so far. Linked folders are walked after all others, so that real paths come first.

    Args:
        base: folder that keys are relative to.
        single: paths of the files that the user named; they are passed over in the folders around them.
    """

    def __init__(self, base: str, single: Set[str]) -> None:
        self.files: list[ImageRef] = []
        self.problems: list[Problem] = []
        self.passed_over: Counter[str] = Counter()
        self._base = base
        self._links: list[tuple[str, str]] = []
        self._seen: set[tuple[int, int]] = set()
        self._single = single
        self._tars: set[str] = set()
        # A folder around the root is walked as "..", "../.." and so on; from there the way down leads to the root.
        self._ways_down: dict[str, str] = {}
        up = ""
        while base != os.path.dirname(base):
            way = f"../{up}".rstrip("/")
            self._ways_down[f"{way}/{os.path.basename(base)}"] = up
            base, up = os.path.dirname(base), way

    def add(self, path: str) -> None:
        """List a path that the user named."""
        store = store_around(path)
        key = _key_below(self._base, path)
        if store is not None:
            self._pass_own(path, "a store" if store == path else f"in the store {shown(store)}")
        elif os.path.isdir(path):
            self._walk(path, key)
        else:
            self._add_single(path, key)

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
            names = {entry.name for entry in entries}
            own = own_folder(path, names)
            if own is not None:
                self._pass_own(path, own)
                continue
            pictures = own_pictures(path, names)
            if pictures:
                self.passed_over["picture of mobilesam"] += len(pictures)
            for entry in entries:
                if entry.name in pictures:
                    continue
                entry_key = f"{key}/{entry.name}" if key else entry.name
                entry_key = self._ways_down.get(entry_key, entry_key)
                if self._add_entry(entry, entry_key):
                    folders.append((entry.path, entry_key))

    def _pass_own(self, path: str, what: str) -> None:
        self.passed_over["folder of mobilesam"] += 1
        self.problems.append(Problem(path=path, reason=f"{what}, no folder of photos: passed over"))

    def _add_entry(self, entry: os.DirEntry[str], key: str) -> bool:
        """List one entry of a folder; return True if it is a folder to walk now."""
        try:
            hidden = hidden_kind(entry.name)
            if hidden is not None:
                self.passed_over[hidden] += 1
            elif entry.is_dir():
                if not entry.is_symlink():
                    return True
                self._links.append((entry.path, key))
            elif not entry.is_file():
                what = "broken link" if entry.is_symlink() else "not a regular file"
                self.passed_over[what] += 1
                self.problems.append(Problem(path=entry.path, reason=what))
            elif entry.path not in self._single:
                self._add_file(entry.path, key, lambda: entry.stat().st_size)
        except OSError as error:
            self.problems.append(Problem(path=entry.path, reason=f"can't be read: {error.strerror}"))
        return False

    def _add_single(self, path: str, key: str) -> None:
        """List a file that the user named; one that is no image is told by its name."""
        try:
            kind = self._add_file(path, key, lambda: os.stat(path).st_size)
        except OSError as error:
            self.problems.append(Problem(path=path, reason=f"can't be read: {error.strerror}"))
            return
        if kind is not None:
            self.problems.append(
                Problem(path=path, reason=f"no image that can be read here, by its kind ({kind})")
            )

    def _add_file(self, path: str, key: str, size: Callable[[], int]) -> str | None:
        """List a file; return its kind if it is passed over without a problem of its own. Raises OSError."""
        name = os.path.basename(path)
        if name.lower().endswith(TAR_SUFFIX):
            self._add_tar(path, key)
            return None
        if name.lower().endswith(COMPRESSED_SUFFIXES):
            self.passed_over["compressed tar"] += 1
            self.problems.append(Problem(path=path, reason=DECOMPRESS))
            return None
        listed, kind = is_image(name, partial(_head, path))
        if listed:
            self.files.append(ImageRef(key=key, size=size(), offset=None))
            return None
        self.passed_over[kind] += 1
        return kind

    def _add_tar(self, path: str, key: str) -> None:
        if path in self._tars:
            return
        self._tars.add(path)
        try:
            contents = scan_tar(path)
        except OSError as error:
            self.problems.append(Problem(path=path, reason=f"tar can't be read: {error.strerror}"))
            return
        with open(path, "rb", buffering=0) as tar:
            for name, member in contents.members.items():
                hidden = _hidden_member(name)
                kind, listed = hidden or "", False
                if hidden is None:
                    size = min(member.size, HEAD_BYTES)
                    head = partial(os.pread, tar.fileno(), size, member.offset)
                    listed, kind = is_image(os.path.basename(name), head)
                if listed:
                    self.files.append(ImageRef(key=f"{key}/{name}", size=member.size, offset=member.offset))
                else:
                    self.passed_over[kind] += 1
        if contents.problem is not None:
            if contents.problem == DECOMPRESS:
                self.passed_over["compressed tar"] += 1
            self.problems.append(Problem(path=path, reason=contents.problem))
        for name in contents.unusable:
            if _hidden_member(name) is None and is_image(os.path.basename(name), bytes)[0]:
                reason = "a link or sparse file in a tar can't be read in place: extract the tar to a folder"
                self.passed_over["link or sparse file in a tar"] += 1
                self.problems.append(Problem(path=f"{path}/{name}", reason=reason))


def _head(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read(HEAD_BYTES)


def _hidden_member(name: str) -> str | None:
    """Return the kind of a tar's member that is passed over for its name, or that of a folder in its path."""
    kinds = (hidden_kind(part) for part in name.split("/") if part not in (".", ".."))
    return next((kind for kind in kinds if kind is not None), None)


def _absolute(path: Path | str) -> str:
    # abspath keeps the user's name of a linked folder, but resolves ".." after a link wrongly.
    path = os.fspath(path)
    return os.path.realpath(path) if ".." in path.split(os.sep) else os.path.abspath(path)


def _check_readable(path: str) -> None:
    """Raise SamError unless the path is a readable folder or file."""
    try:
        if os.path.isdir(path):
            os.scandir(path).close()
            return
        if os.path.exists(path) and not os.path.isfile(path):
            raise SamError(f"--images {shown(path)} is neither a folder nor a regular file")
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise SamError(f"--images {shown(path)}: no such folder, tar or image") from None
    except OSError as error:
        raise SamError(f"--images {shown(path)} can't be read: {error.strerror}") from error


def _key_below(base: str, path: str) -> str:
    """Return the key of a path, "" for the base itself; one outside it begins with as many ".." as lead up."""
    key = os.path.relpath(path, base)
    return "" if key == "." else key


def _nothing_found(tops: Sequence[str], listing: _Listing) -> str:
    where = shown(tops[0]) + (f" and {len(tops) - 1} more" if len(tops) > 1 else "")
    message = f"no images in {where}"
    if listing.passed_over:
        message += f"; {passed_over_line(listing.passed_over)}"
    if listing.problems:
        message += f"\n{counted(len(listing.problems), 'problem')}, the first: {listing.problems[0]}"
    return message


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
