"""Listing of a run's images under the keys that its store knows them by."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import PrecomputeError, counted, shown
from ..common.image_ref import ImageRef
from ..sam import ImageError, ImageSet, list_images, read_image
from ..sam.photos.file_kinds import store_around
from ..sam.photos.image_files import expand_paths
from ..sam.photos.tar_files import place_on_disk
from ..store import EmbeddingStore, ImageRecord, StoreSpec
from ..store.manifest import Manifest
from .config import PrecomputeConfig
from .progress import Observer

SHOWN_PROBLEMS = 20
"""Most files that could not be listed and are told one by one."""

_SAMPLE = 64
"""Images of the store, and of a listing, among which images of both are looked for."""
_COMPARED = 8
"""About as many of them are compared by their content."""


@dataclass(kw_only=True)
class Absent:
    """Images of a store that a listing lacks."""

    rows: int = 0
    """Images of the store."""
    count: int = 0
    """Images of the store that the listing lacks."""
    first: bytes | None = None
    """Key of the first one."""


def list_planned(config: PrecomputeConfig, spec: StoreSpec | None, observer: Observer) -> ImageSet:
    """List the images of a run under the keys that the store knows them by.

    Keys are relative to the store's image root, for images outside it too, so that any folders may be named later
    than when the store was made. Only if the store's own photos are found elsewhere is that place the new root.

    Args:
        config: options of the run.
        spec: description of the store; None if a new one will be made.
        observer: receives a message for each file that can't be listed, up to `SHOWN_PROBLEMS`.

    Raises:
        SamError: the images can't be listed.
    """
    listing = list_images(config.images) if spec is None else _list_known(config, spec, observer)
    for problem in listing.problems[:SHOWN_PROBLEMS]:
        observer.message(f"skipped: {problem}")
    if len(listing.problems) > SHOWN_PROBLEMS:
        observer.message(f"skipped: {len(listing.problems) - SHOWN_PROBLEMS:,} more")
    return listing


def _list_known(config: PrecomputeConfig, spec: StoreSpec, observer: Observer) -> ImageSet:
    root = Path(spec.image_root)
    paths = [Path(path) for path in expand_paths(config.images)]
    first = Path(expand_paths(config.images[:1])[0])
    with EmbeddingStore.open(config.out) as store:
        key = os.fsdecode(next(store.manifest.sorted_keys(), b""))
        are_there = os.path.lexists(place_on_disk(root, key))
        if are_there and all(path.is_relative_to(root) for path in paths):
            return list_images(paths, root)
        for place in (None, first if first.is_dir() else first.parent):
            listing = list_images(paths, place)
            if _holds_stored(listing, store.manifest):
                if listing.root != root:
                    observer.message(f"the store's photos, once in {root}, are read from {listing.root}")
                return listing
    return list_images(paths, root)


def _holds_stored(listing: ImageSet, manifest: Manifest) -> bool:
    """Return True if a listing has the store's own photos under the store's keys.

    Of samples of both, half of the one or of the other must be in both, and most of these the same image: another
    folder may hold copies of some photos, or other photos of the same names.
    """
    rows, files = manifest.row_count(), listing.files
    picked = range(0, rows, max(rows // _SAMPLE, 1))
    stored = {record.key: record for row in picked for record in manifest.records(None, range(row, row + 1))}
    listed = {file.key: manifest.find(file.key) for file in files[:: max(len(files) // _SAMPLE, 1)]}
    both = stored | {key: record for key, record in listed.items() if record is not None}
    known = [file for file in files if file.key in both]
    shares = (
        sum(file.key in stored for file in known) / len(stored),
        sum(record is not None for record in listed.values()) / len(listed),
    )
    compared = known[:: max(len(known) // _COMPARED, 1)]
    same = sum(_is_image_of(listing.root, file, both[file.key]) for file in compared)
    return max(shares) >= 0.5 and 2 * same >= len(compared)


def _is_image_of(root: Path, file: ImageRef, record: ImageRecord) -> bool:
    """Compare a file with a stored image, by SHA-256 where it is known, else by length."""
    if record.sha256 is None:
        return file.size == record.size
    if file.size != record.bytes:
        return False
    try:
        data = read_image(root, file.key, offset=file.offset, size=file.size)
    except ImageError:
        return False
    return hashlib.sha256(data).hexdigest() == record.sha256


def source_path(path: Path) -> str:
    """Return the absolute path or pattern to be named when the store is resumed."""
    return os.path.abspath(path if os.path.lexists(path) else path.expanduser())


def refuse_absent(
    config: PrecomputeConfig, absent: Absent, spec: StoreSpec, root: Path, observer: Observer
) -> None:
    """Refuse a listing that lacks images of the store, or tell of them if images are only to be added.

    Args:
        config: options of the run.
        absent: images that the listing lacks.
        spec: description of the store.
        root: root of the listing.
        observer: receives the message.

    Raises:
        PrecomputeError: images are absent, and `--extend` isn't given; or they are another store's kept images.
    """
    if absent.first is None:
        return
    key, rows = os.fsdecode(absent.first), absent.rows
    place = place_on_disk(root, key)
    if store_around(place) is not None:
        raise PrecomputeError(
            f"{config.out} holds kept images of a store as if they were photos, the first: {shown(key)} (an older "
            "version listed them); precompute the photos into a new store"
        )
    if not config.extend:
        if os.path.lexists(place):
            raise PrecomputeError(
                f"{absent.count:,} of the store's {counted(rows, 'image')} "
                f"{'lies' if absent.count == 1 else 'lie'} outside what --images names, the first: "
                f"{shown(place)}; name all of the store's folders, or add images only with --extend"
            )
        raise PrecomputeError(
            f"{absent.count:,} of the store's {counted(rows, 'image')} "
            f"{'is' if absent.count == 1 else 'are'} gone from the folder, the first: {shown(key)}; put "
            "them back, give another --out, or add images only with --extend"
        )
    needs = "distill needs these photos" if spec.kept_images is None else "the store keeps them resized"
    observer.message(
        f"{absent.count:,} of the store's {counted(rows, 'image')} "
        f"{'is' if absent.count == 1 else 'are'} not among those listed, the first: {shown(key)}; their "
        f"embeddings stay, {needs}"
    )
