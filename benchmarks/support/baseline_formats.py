"""Other formats for embeddings on disk, written and read as their users do. None of them verifies what it reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np

Rows = Iterator[np.ndarray]


class Format(Protocol):
    """Format that is written to a folder once, then read by row numbers, one batch at a time."""

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """Return the rows in the order given, stacked."""


class NpyPerImage:
    """One .npy file an image, with `np.save` and `np.load`, as most scripts do."""

    def __init__(self, folder: Path, rows: Rows, dtype: str) -> None:
        self._folder = folder
        for number, row in enumerate(rows):
            np.save(self._path(number), row.astype(dtype))

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.npy"

    def read(self, rows: Sequence[int]) -> np.ndarray:
        return np.stack([np.load(self._path(row)) for row in rows])


class _OneFile:
    """Rows one after the other in one file, without a header."""

    def __init__(self, folder: Path, rows: Rows, dtype: str) -> None:
        self._path, self._dtype = folder / "rows.bin", np.dtype(dtype)
        with self._path.open("wb") as file:
            for row in rows:
                self._shape = row.shape
                file.write(row.astype(dtype).tobytes())
        self._bytes = int(np.prod(self._shape)) * self._dtype.itemsize


class Preadv(_OneFile):
    """One positioned read a row into a reused batch: the lower bound of the work."""

    def __init__(self, folder: Path, rows: Rows, dtype: str) -> None:
        super().__init__(folder, rows, dtype)
        self._descriptor = os.open(self._path, os.O_RDONLY)
        self._batch = np.empty((0, *self._shape), self._dtype)

    def read(self, rows: Sequence[int]) -> np.ndarray:
        if len(self._batch) < len(rows):
            self._batch = np.empty((len(rows), *self._shape), self._dtype)
        out = self._batch[: len(rows)]
        for place, row in enumerate(rows):
            os.preadv(self._descriptor, [out[place].reshape(-1).view(np.uint8).data], row * self._bytes)
        return out


class Memmap(_OneFile):
    """`np.memmap`, indexed with a list.

    Mapped again for each batch: mapped pages can't be dropped from the system's cache, so no pass would be cold.
    """

    def read(self, rows: Sequence[int]) -> np.ndarray:
        return np.memmap(self._path, self._dtype, "r").reshape(-1, *self._shape)[list(rows)]


class FlatRecord(_OneFile):
    """Flat binary file of records of one size, with seek, read and frombuffer, as EdgeSAM keeps its embeddings."""

    def read(self, rows: Sequence[int]) -> np.ndarray:
        items = []
        with self._path.open("rb") as file:
            for row in rows:
                file.seek(row * self._bytes)
                items.append(np.frombuffer(file.read(self._bytes), self._dtype).reshape(self._shape).copy())
        return np.stack(items)


class Streaming:
    """MosaicML Streaming's MDS shards, read with its LocalDataset."""

    def __init__(self, folder: Path, rows: Rows, dtype: str) -> None:
        from streaming import LocalDataset, MDSWriter

        with MDSWriter(out=str(folder), columns={"embedding": "ndarray"}, size_limit=1 << 27) as writer:
            for row in rows:
                writer.write({"embedding": row.astype(dtype)})
        self._data = LocalDataset(str(folder))

    def read(self, rows: Sequence[int]) -> np.ndarray:
        return np.stack([self._data[row]["embedding"] for row in rows])

    @staticmethod
    def installed() -> bool:
        """Return True if the package of the extra [bench] is installed."""
        return find_spec("streaming") is not None
