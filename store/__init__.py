"""Embeddings on disk: the format, the manifest, shards, commits, integrity. No torch.

Read a store with `EmbeddingStore.open(path)`; any Zarr v3 reader opens the same files.
"""

from .draft import refuse_taken
from .embedding_store import EmbeddingStore, encode_head, exists
from .errors import StoreDamaged, StoreError, StoreLocked, StoreMismatch, StoreNotFound
from .layout import PIXELS_PER_CELL, ArrayLayout, array_layouts, rows_of, shard_count
from .reader import StoredBatch
from .records import Counts, ImageRecord, NewImage, RowResult, Selection
from .spec import DTYPES, PRECISIONS, StoreSpec
from .writer import ShardWriter, StoredRow

__all__ = [
    "DTYPES",
    "PIXELS_PER_CELL",
    "PRECISIONS",
    "ArrayLayout",
    "Counts",
    "EmbeddingStore",
    "ImageRecord",
    "NewImage",
    "RowResult",
    "Selection",
    "ShardWriter",
    "StoreDamaged",
    "StoreError",
    "StoreLocked",
    "StoreMismatch",
    "StoreNotFound",
    "StoreSpec",
    "StoredBatch",
    "StoredRow",
    "array_layouts",
    "encode_head",
    "exists",
    "refuse_taken",
    "rows_of",
    "shard_count",
]
