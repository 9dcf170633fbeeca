"""Embeddings on disk: the format, the manifest, shards, commits, integrity. No torch.

Read a store with `EmbeddingStore.open(path)`; any Zarr v3 reader opens the same files.
"""

from ..common.config import DTYPES, PRECISIONS
from ..common.errors import StoreDamaged, StoreError, StoreLocked, StoreMismatch, StoreNotFound
from ..common.image_ref import ImageRef
from .audit_limits import TOLERANCES, Tolerance, audit_summary, tolerance
from .layout import PIXELS_PER_CELL, ArrayLayout, array_layouts, rows_of, shard_count
from .reader import StoredBatch
from .records import Audit, Counts, ImageRecord, KeptImage, Problem, RowResult, Selection
from .sam_head import encode_head
from .spec import StoreSpec
from .store import EmbeddingStore, refuse_taken
from .writer import ShardWriter, StoredRow
from .zarr_metadata import exists

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
    "ImageRef",
    "KeptImage",
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
