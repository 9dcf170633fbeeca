"""Committed rows of a store, by columns: millions of them take no record each in memory.

Shape suffixes: N rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ...common.errors import StoreDamaged
from ...store import EmbeddingStore, ImageRecord

KEPT_RECORDS = 4096
"""Records that `RecordsByRow` keeps: those of the batches that are read ahead, and of the one in use."""


@dataclass(frozen=True, eq=False)
class CommittedRows:
    """Done rows of a store: their numbers, their images' hashes, and a digest of all their checksums."""

    rows_N: npt.NDArray[np.int64]
    """Ascending."""
    sha256_N: npt.NDArray[np.bytes_]
    """SHA-256 of each row's image file, 32 bytes."""
    digest: str
    """Eight hexadecimal digits of the SHA-256 of the rows' numbers and checksums, which cover images and
    embeddings."""

    def __len__(self) -> int:
        return len(self.rows_N)

    @classmethod
    def of(cls, store: EmbeddingStore) -> CommittedRows:
        """Read the rows of a store.

        Raises:
            StoreDamaged: the manifest is damaged.
        """
        with store.manifest.snapshot():
            count = store.manifest.counts().done
            rows_N, sha256_N = np.empty(count, np.int64), np.empty((count, 32), np.uint8)
            # The JSON of the list of all rows, [row, crc32c, crc32c of the scales, SHA-256] each.
            hashed, filled = hashlib.sha256(b"[["), 0
            for page in store.manifest.done_rows():
                here = slice(filled, filled + len(page))
                if here.stop > count:
                    break
                rows_N[here] = [row for row, *_ in page]
                sha256_N[here] = np.frombuffer(b"".join(sha for _, sha, *_ in page), np.uint8).reshape(-1, 32)
                lines = [
                    f'[{row},{crc},{"null" if scales is None else scales},"{sha.hex()}"]'
                    for row, sha, crc, scales in page
                ]
                hashed.update((("," if filled else "") + ",".join(lines)).encode())
                filled = here.stop
        if filled != count:
            raise StoreDamaged(f"{store.path}: its manifest counts {count:,} finished rows, but has others")
        hashed.update(b"]]")
        return cls(rows_N, np.ascontiguousarray(sha256_N).view("S32")[:, 0], hashed.hexdigest()[:8])


class RecordsByRow(Mapping[int, ImageRecord]):
    """Records of a store's done rows by row, read from the manifest when they are asked for.

    Args:
        store: store open for reading.
    """

    def __init__(self, store: EmbeddingStore) -> None:
        self._manifest = store.manifest
        self._read = lru_cache(KEPT_RECORDS)(self._find)

    def __getitem__(self, row: int) -> ImageRecord:
        return self._read(row)

    def _find(self, row: int) -> ImageRecord:
        found = self._manifest.records("done", range(row, row + 1))
        if not found:
            raise KeyError(row)
        return found[0]

    def __iter__(self) -> Iterator[int]:
        for page in self._manifest.done_rows():
            yield from (row for row, *_ in page)

    def __len__(self) -> int:
        return self._manifest.counts().done
