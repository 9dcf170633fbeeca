"""Files in a store that no listing speaks of: attempts that came to nothing. Other people's files are not ours."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from .kept_images import FOLDER
from .layout import ArrayLayout
from .places import PRIVATE

_DOCUMENT = re.compile(r"zarr\.json\.[0-9a-f]{8}\.partial")
_TAR = re.compile(r"(0|[1-9]\d*)\.tar")
_PARTIAL_TAR = re.compile(r"\d+\.tar\.[^.]+\.partial")
_PRIVATE = re.compile(r"(writer\.json|sam_head\.safetensors)\.[0-9a-f]{8}\.partial")


def partial_files(store: Path, layouts: Sequence[ArrayLayout]) -> Iterator[Path]:
    """What writing leaves behind when it is cut short. With a live writer it may be at work on them."""
    yield from _matching(store, _DOCUMENT)
    yield from _matching(store / PRIVATE, _PRIVATE)
    yield from _matching(store / FOLDER, _PARTIAL_TAR)
    for layout in layouts:
        zeros = r"\.0" * len(layout.item_shape)
        attempt = re.compile(rf"c\.\d+{zeros}\.[^.]+\.partial|{_DOCUMENT.pattern}")
        yield from _matching(store / layout.name, attempt)


def unlisted_shards(
    store: Path, layouts: Sequence[ArrayLayout], listed: Container[int]
) -> Iterator[tuple[int, Path]]:
    """Shard files, with their number, that are in their place though no listing says so: a writer was killed
    before it listed them, or the shard was withdrawn."""
    for layout in layouts:
        zeros = r"\.0" * len(layout.item_shape)
        for path in _matching(store / layout.name, re.compile(rf"c\.(0|[1-9]\d*){zeros}")):
            shard = int(path.name.split(".")[1])
            if shard not in listed:
                yield shard, path
    for path in _matching(store / FOLDER, _TAR):
        if int(path.stem) not in listed:
            yield int(path.stem), path


def _matching(folder: Path, pattern: re.Pattern[str]) -> Iterator[Path]:
    """Files of the folder whose whole name matches."""
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return
    with entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                yield folder / entry.name
