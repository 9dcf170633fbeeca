"""Where images come from: folders and tars, listed under one root."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import SamError
from .tars import COMPRESSED_SUFFIXES, DECOMPRESS, TAR_SUFFIX, scan_tar

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""What counts as an image, in any case; the content decides later which format it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFile:
    """One image as it was listed."""

    key: str
    """Path below the root, "/"-separated, bytes that are not UTF-8 as surrogates; a tar acts as a folder."""
    size: int
    """Bytes."""
    offset: int | None
    """Where the image's bytes begin in its tar; None for a file of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something that should have been listed and could not be."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """What `list_images` found."""

    root: Path
    """Absolute; the keys are relative to it."""
    files: tuple[ImageFile, ...]
    """Sorted by the bytes of the key; no key twice."""
    problems: tuple[Problem, ...]
    """Folders and tars that could not be read, or not to their end; broken links. To be shown to the user."""
    others: int
    """Files passed over because their name is not an image's (SA-1B's .json, for one)."""
    hidden: int
    """Files and folders passed over because their name begins with a dot."""


def list_images(paths: Sequence[Path | str], root: Path | str | None = None) -> ImageSet:
    """Find the images in folders (recursively) and .tar files, in any mixture.

    Keys are relative to `root`; by default that is the one folder, the folder of the one tar, or the deepest
    folder that holds all of `paths`. Symbolic links are followed, but a folder that is reached twice counts once,
    under its own path rather than a link's: loops end, and a link named `latest` doubles nothing. Names that begin
    with a dot are passed over.

    Raises SamError where a path is absent, unreadable, of another kind or outside `root`, or nothing is found.
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


def shown(key: str) -> str:
    """A key or path fit for a line of output: what can't be printed (newlines, bytes not UTF-8) is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in key)


class _Listing:
    """Collects while it walks. Folders behind links wait for all others, so that real paths come first."""

    def __init__(self) -> None:
        self.files: list[ImageFile] = []
        self.problems: list[Problem] = []
        self.others = 0
        self.hidden = 0
        self._links: list[tuple[str, str]] = []
        self._seen: set[tuple[int, int]] = set()
        self._tars: set[str] = set()

    def add(self, path: str, key: str) -> None:
        """List a folder or a tar, whose key is "" if it is the root itself."""
        if os.path.isdir(path):
            self._walk(path, key)
        else:
            self._add_tar(path, key)

    def follow_links(self) -> None:
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
        """Returns whether the entry is a folder to walk now."""
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
                self.files.append(ImageFile(key=key, size=entry.stat().st_size, offset=None))
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
                self.files.append(ImageFile(key=f"{key}/{name}", size=member.size, offset=member.offset))
            else:
                self.others += 1
        if contents.problem is not None:
            self.problems.append(Problem(path=path, reason=contents.problem))
        for name in contents.unusable:
            if name.lower().endswith(IMAGE_SUFFIXES) and not _is_hidden(name):
                reason = "a link or sparse file in a tar can't be read in place: extract the tar to a folder"
                self.problems.append(Problem(path=f"{path}/{name}", reason=reason))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _absolute(path: Path | str) -> str:
    # abspath keeps the user's own name for a linked folder, but is wrong about ".." behind a link.
    path = os.fspath(path)
    return os.path.realpath(path) if ".." in path.split(os.sep) else os.path.abspath(path)


def _check_top(path: str) -> None:
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
