"""Rows of withdrawn shards, remembered until the shard is committed again: they are written once more if their images
are gone by then.

A withdrawn shard's files stay in their places until the new ones replace them. What the manifest listed of its rows
is kept beside the manifest, in a file per shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..common.durable import make_folder, write_atomic
from ..common.errors import StoreError
from .checksum import crc32c
from .kept_images import read_kept, tar_path
from .layout import PRIVATE, ArrayLayout
from .reader import ShardFile
from .records import ImageRecord, KeptImage, RowResult

FOLDER = PRIVATE / "carried"


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
            for value in json.loads(_place(store, shard).read_bytes())["rows"]:
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
        make_folder(store / FOLDER)
        write_atomic(_place(store, shard), json.dumps({"rows": rows}).encode())


def forget_carried(store: Path, shard: int) -> None:
    """Forget a shard that was committed again."""
    with suppress(OSError):
        _place(store, shard).unlink(missing_ok=True)
        (store / FOLDER).rmdir()  # unless others are in it


def _place(store: Path, shard: int) -> Path:
    return store / FOLDER / f"{shard}.json"


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


def _result(value: dict) -> RowResult:
    kept = value.pop("kept")
    sizes = {name: tuple(value.pop(name)) for name in ("original_size", "resized_size")}
    return RowResult(**value, **sizes, kept=None if kept is None else KeptImage(**kept))


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
