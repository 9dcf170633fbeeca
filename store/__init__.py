"""Embeddings on disk: the format, the manifest, shards, commits, integrity. No torch.

Read a store with `EmbeddingStore.open(path)`; any Zarr v3 reader opens the same files.
"""

from .draft import refuse_taken
from .embedding_store import EmbeddingStore
from .errors import StoreDamaged, StoreError, StoreLocked, StoreMismatch, StoreNotFound
from .head import encode_head
from .layout import PIXELS_PER_CELL, ArrayLayout, array_layouts, rows_of, shard_count
from .metadata import exists
from .reader import StoredBatch
from .records import Audit, Counts, ImageRecord, KeptImage, NewImage, Problem, RowResult, Selection
from .spec import DTYPES, PRECISIONS, StoreSpec
from .tolerance import TOLERANCES, Tolerance, audit_summary, tolerance
from .writer import ShardWriter, StoredRow

__all__ = [
    "DTYPES",
    "PIXELS_PER_CELL",
    "PRECISIONS",
    "TOLERANCES",
    "ArrayLayout",
    "Audit",
    "Counts",
    "EmbeddingStore",
    "ImageRecord",
    "KeptImage",
    "NewImage",
    "Problem",
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
    "Tolerance",
    "array_layouts",
    "audit_summary",
    "encode_head",
    "exists",
    "refuse_taken",
    "rows_of",
    "shard_count",
    "tolerance",
]
