"""Shard files being written by workers, under partial names, without lock or manifest; leftovers of killed writers;
rows of withdrawn shards, which are written once more if their images are gone.

Shape suffixes: C channels, H and W rows and columns of an embedding.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..common.durable import explain_os_errors, make_folder, write_atomic
from ..common.errors import StoreError
from .checksum import CHECKSUM_BYTES, crc32c
from .kept_images import BLOCK, END, FOLDER, header, padding, partial_tar_path, read_kept, tar_path
from .layout import PRIVATE, ArrayLayout
from .quantize import quantize
from .reader import ShardFile
from .records import ImageRecord, KeptImage, RowResult

_DOCUMENT = re.compile(r"zarr\.json\.[0-9a-f]{8}\.partial")
_TAR = re.compile(r"(0|[1-9]\d*)\.tar")
_PARTIAL_TAR = re.compile(r"\d+\.tar\.[^.]+\.partial")
_PRIVATE = re.compile(r"(writer\.json|sam_head\.safetensors)\.[0-9a-f]{8}\.partial")
"""Names of a writer's temporary and final files; files with other names are never touched."""


@dataclass(frozen=True, kw_only=True)
class StoredRow:
    """Checksums of a row as written."""

    crc32c: int
    """Checksum of the embedding's bytes."""
    scales_crc32c: int | None
    """Checksum of its scales' bytes; None except in int8 stores."""
    kept: KeptImage | None
    """Place and checksum of its image; None in stores that keep no images."""


class ShardWriter:
    """Writer of one shard: rows go to `SHARD.ATTEMPT.partial`, one file per array, kept images to a tar.

    Use as a context manager: leaving it by an exception, or without `finish`, removes the partial files.

    Args:
        store: path of the store.
        layouts: layouts of the store's arrays, `embeddings` first.
        shard: number of the shard.
        attempt: name of this attempt, unique in the store.
        slots: rows of the shard, failed ones included.
        kept_images: file type of the kept images; None in stores that keep none.
    """

    def __init__(
        self,
        store: Path,
        layouts: Sequence[ArrayLayout],
        shard: int,
        attempt: str,
        slots: int,
        kept_images: str | None = None,
    ) -> None:
        self._layouts = layouts
        self._slots = slots
        self._first_row = shard * layouts[0].shard_size
        self._kept_images = kept_images
        self._kept_end = 0
        self._paths = [partial_path(store, layout, shard, attempt) for layout in layouts]
        if kept_images is not None:
            self._paths.append(partial_tar_path(store, shard, attempt))
        self._present: list[int] = []
        self._finished = False
        self._descriptors: list[int] = []

    def __enter__(self) -> ShardWriter:
        try:
            for path in self._paths:
                with explain_os_errors(path):
                    self._descriptors.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except BaseException:
            self._abandon()
            raise
        return self

    def add(self, slot: int, emb_CHW: np.ndarray, image: bytes | None = None) -> StoredRow:
        """Write one row in the store's dtype; one thread at a time.

        Args:
            slot: position of the row in the shard, from 0.
            emb_CHW: float32 (256, g, g).
            image: content of the image file to keep; None in stores that keep no images.

        Returns:
            The row's checksums, and the place of its image.

        Raises:
            ValueError: another shape, or a value that is NaN or infinite before or after the conversion.
            StoreError: the disk is full or fails.
        """
        if emb_CHW.shape != self._layouts[0].item_shape:
            raise ValueError(f"the embedding has shape {emb_CHW.shape}, not {self._layouts[0].item_shape}")
        return self.add_stored(slot, _encode(emb_CHW, self._layouts[0].dtype), image)

    def add_stored(self, slot: int, items: Sequence[np.ndarray], image: bytes | None = None) -> StoredRow:
        """Write one row as the store's arrays hold it; else as `add`.

        Args:
            slot: position of the row in the shard, from 0.
            items: its item in each array, `embeddings` first.
            image: content of the image file to keep; None in stores that keep no images.
        """
        descriptors = self._descriptors[: len(items)]
        with explain_os_errors(self._paths[0]):
            checksums = [
                _write_chunk(descriptor, slot * layout.stride, item)
                for descriptor, layout, item in zip(descriptors, self._layouts, items, strict=True)
            ]
        kept = self._keep(slot, image)
        self._present.append(slot)
        scales = checksums[1] if len(checksums) > 1 else None
        return StoredRow(crc32c=checksums[0], scales_crc32c=scales, kept=kept)

    def _keep(self, slot: int, image: bytes | None) -> KeptImage | None:
        assert (image is None) == (self._kept_images is None), "images are kept of all rows, or of none"
        if self._kept_images is None or image is None:
            return None
        head = header(self._first_row + slot, self._kept_images, len(image))
        with explain_os_errors(self._paths[-1]):
            _write_all(self._descriptors[-1], [head, image, bytes(padding(len(image)))], self._kept_end)
        kept = KeptImage(offset=self._kept_end + BLOCK, bytes=len(image), crc32c=crc32c(image))
        self._kept_end += BLOCK + len(image) + padding(len(image))
        return kept

    def finish(self) -> None:
        """Write the indexes and sync the files to disk; the coordinator may then commit them."""
        ends = [(layout.encode_index(self._present), self._slots * layout.stride) for layout in self._layouts]
        if self._kept_images is not None:
            ends.append((END, self._kept_end))
        for path, descriptor, (end, offset) in zip(self._paths, self._descriptors, ends, strict=True):
            with explain_os_errors(path):
                _write_all(descriptor, [end], offset)
                os.fsync(descriptor)
        self._finished = True

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._finished:
            self._close()
        else:
            self._abandon()

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _abandon(self) -> None:
        self._close()
        for path in self._paths:
            path.unlink(missing_ok=True)


def partial_path(store: Path, layout: ArrayLayout, shard: int, attempt: str) -> Path:
    """Return the path of the file that one attempt at a shard writes for an array, before the shard is committed.

    Args:
        store: path of the store.
        layout: layout of the array.
        shard: number of the shard.
        attempt: name of the attempt, unique in the store.
    """
    return store / layout.name / f"{layout.file_name(shard)}.{attempt}.partial"


def _encode(emb_CHW: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """Return the row as each array of the store holds it: the embedding, in int8 stores also its scales."""
    if not np.isfinite(emb_CHW).all():
        raise ValueError("the teacher gave NaN or infinite values")
    if dtype == np.int8:
        return quantize(emb_CHW)
    with np.errstate(over="ignore"):
        values_CHW = np.ascontiguousarray(emb_CHW, dtype=dtype)
    if not np.isfinite(values_CHW).all():
        raise ValueError(
            f"the teacher's values reach {np.abs(emb_CHW).max():.4g}, beyond {dtype.name}'s range: "
            "store them as float32"
        )
    return (values_CHW,)


def _write_chunk(descriptor: int, offset: int, item: np.ndarray) -> int:
    checksum = crc32c(item)
    buffers: list[memoryview | bytes] = [
        item.reshape(-1).view(np.uint8).data,
        checksum.to_bytes(CHECKSUM_BYTES, "little"),
    ]
    _write_all(descriptor, buffers, offset)
    return checksum


def _write_all(descriptor: int, buffers: Sequence[memoryview | bytes], offset: int) -> None:
    """Call pwritev until everything is written: one call may write less."""
    pending = [memoryview(buffer) for buffer in buffers]
    while pending:
        written = os.pwritev(descriptor, pending, offset)
        offset += written
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if pending:
            pending[0] = pending[0][written:]


# ---- rows of withdrawn shards. Their files stay in their places until the new ones replace them; what the manifest
# listed of the rows is kept beside it, in a file per shard.

CARRIED = PRIVATE / "carried"
_CARRIED = re.compile(r"\d+\.json")


@dataclass(frozen=True, kw_only=True)
class CarriedRow:
    """Row as it was committed."""

    result: RowResult
    items: tuple[np.ndarray, ...]
    """Its item in each array, `embeddings` first."""
    image: bytes | None
    """Content of its kept image; None in stores that keep none."""


class CarriedRows:
    """Rows that a withdrawn shard had; none if nothing is remembered of it.

    Args:
        store: path of the store.
        layouts: layouts of the store's arrays.
        shard: number of the shard.
    """

    def __init__(self, store: Path, layouts: tuple[ArrayLayout, ...], shard: int) -> None:
        self._store, self._layouts, self._shard = store, layouts, shard
        self._results: dict[int, RowResult] = {}
        with suppress(OSError, ValueError, KeyError, TypeError):  # then the rows are computed, or fail
            for value in json.loads(_carried_path(store, shard).read_bytes())["rows"]:
                result = _result(value)
                self._results[result.row] = result

    def read(self, row: int) -> CarriedRow | None:
        """Return a row that is whole by its checksums; None if there is none."""
        result = self._results.get(row)
        if result is None:
            return None
        checksums = (result.crc32c, result.scales_crc32c)
        try:
            items = tuple(
                _read_item(self._store, layout, self._shard, row, checksum or 0)
                for layout, checksum in zip(self._layouts, checksums, strict=False)
            )
            image = None
            if result.kept is not None:
                image = read_kept(tar_path(self._store, self._shard), f"row {row}", row, result.kept)
        except (StoreError, OSError):
            return None
        return CarriedRow(result=result, items=items, image=image)


def carry(store: Path, shard: int, records: Iterable[ImageRecord]) -> None:
    """Remember the done rows of a shard that is about to be withdrawn.

    Args:
        store: path of the store.
        shard: number of the shard.
        records: its committed rows.

    Raises:
        OSError: the file can't be written.
    """
    rows = [asdict(_of_record(record)) for record in records if record.status == "done"]
    if rows:
        make_folder(store / CARRIED)
        write_atomic(_carried_path(store, shard), json.dumps({"rows": rows}).encode())


def forget_carried(store: Path, committed: Container[int]) -> None:
    """Forget the rows of shards that are committed, again or still.

    Args:
        store: path of the store.
        committed: numbers of committed shards.
    """
    with suppress(OSError):
        for path in _matching(store / CARRIED, _CARRIED):
            if int(path.stem) in committed:
                path.unlink(missing_ok=True)
        (store / CARRIED).rmdir()  # unless others are in it


def _carried_path(store: Path, shard: int) -> Path:
    return store / CARRIED / f"{shard}.json"


def _of_record(record: ImageRecord) -> RowResult:
    return RowResult(
        row=record.row,
        sha256=record.sha256,
        bytes=record.bytes,
        original_size=record.original_size,
        resized_size=record.resized_size,
        crc32c=record.crc32c,
        scales_crc32c=record.scales_crc32c,
        kept=record.kept,
    )


def _result(value: dict[str, Any]) -> RowResult:
    kept = value.pop("kept")
    sizes = {name: tuple(value.pop(name)) for name in ("original_size", "resized_size")}
    fields: dict[str, Any] = {**value, **sizes, "kept": None if kept is None else KeptImage(**kept)}
    return RowResult(**fields)


def _read_item(store: Path, layout: ArrayLayout, shard: int, row: int, checksum: int) -> np.ndarray:
    """Read a row's item of one array. Raises StoreError if it isn't the one with this checksum."""
    file = ShardFile(store / layout.name / layout.file_name(shard), layout, {row: checksum}, direct=False)
    item = np.empty(layout.item_shape, layout.dtype)
    payload = item.reshape(-1).view(np.uint8)
    offset = row % layout.shard_size * layout.stride
    stored = file.read(offset, payload)
    if not stored == crc32c(payload) == checksum:
        raise StoreError(f"{file.path}, row {row}: not the row that was committed")
    return item


# ---- leftovers of interrupted writers


def partial_files(store: Path, layouts: Sequence[ArrayLayout]) -> Iterator[Path]:
    """Yield the partial files in a store.

    An interrupted writer left them, unless a live one is still writing them.

    Args:
        store: path of the store.
        layouts: layouts of the store's arrays.
    """
    yield from _matching(store, _DOCUMENT)
    yield from _matching(store / PRIVATE, _PRIVATE)
    yield from _matching(store / CARRIED, re.compile(rf"{_CARRIED.pattern}\.[0-9a-f]{{8}}\.partial"))
    yield from _matching(store / FOLDER, _PARTIAL_TAR)
    for layout in layouts:
        zeros = r"\.0" * len(layout.item_shape)
        attempt = re.compile(rf"c\.\d+{zeros}\.[^.]+\.partial|{_DOCUMENT.pattern}")
        yield from _matching(store / layout.name, attempt)


def unlisted_shards(
    store: Path, layouts: Sequence[ArrayLayout], listed: Container[int]
) -> Iterator[tuple[int, Path]]:
    """Yield the shard files under their final names whose shard is not committed.

    A writer was killed between moving and listing them, or the shard was withdrawn.

    Args:
        store: path of the store.
        layouts: layouts of the store's arrays.
        listed: numbers of the committed shards.

    Returns:
        Pairs of the shard's number and the file's path.
    """
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
    """Yield the files of a folder whose full name matches. Files with other names are not ours."""
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return
    with entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                yield folder / entry.name
