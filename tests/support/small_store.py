"""Small stores: 8 rows of 256 x 4 x 4 in shards of 3, so that the last shard is short."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import numpy as np

from mobilesam.store import (
    EmbeddingStore,
    ImageRef,
    RowResult,
    Selection,
    ShardWriter,
    StoreSpec,
    encode_head,
)

ROWS = 8
SHARD_SIZE = 3
EVERYTHING = Selection(fraction=1.0, seed=0, limit=None)
HEAD, HEAD_SHA256 = encode_head({"prompt_encoder.weight": np.arange(3, dtype=np.float32)})


def make_spec(**changes: object) -> StoreSpec:
    """Return the small store's spec with some fields changed."""
    settings = {
        "store_id": uuid.uuid4().hex,
        "teacher": "vit_nano",
        "checkpoint": None,
        "checkpoint_sha256": "ab" * 32,
        "head_sha256": HEAD_SHA256,
        "image_size": 64,
        "positions_interpolated": True,
        "preprocessing": {"mean": [1.0, 2.0, 3.0], "filter": "bilinear"},
        "dtype": "float16",
        "precision": "float32",
        "shard_size": SHARD_SIZE,
        "subset": {"fraction": 1.0, "seed": 0},
        "image_root": "/photos",
        "versions": {"mobilesam": "0"},
    }
    return StoreSpec(**(settings | changes))


def embeddings(rows: int = ROWS, seed: int = 0) -> np.ndarray:
    """Return random embeddings, float32 (rows, 256, 4, 4)."""
    return np.random.default_rng(seed).normal(0, 3, (rows, 256, 4, 4)).astype(np.float32)


def images(rows: int = ROWS) -> list[ImageRef]:
    """Return references to images that do not exist."""
    return [ImageRef(key=f"photo{row:04d}.jpg", size=100 + row) for row in range(rows)]


def picture(row: int) -> bytes:
    """Return the bytes that a store with kept images holds for a row; each row has another length."""
    return b"the image of row %d " % row * (20 + 13 * row)


def compute(
    store: EmbeddingStore,
    emb_BCHW: np.ndarray,
    failed: Sequence[int] = (),
    shards: Sequence[int] | None = None,
) -> None:
    """Commit pending shards as a worker and a coordinator would."""
    for shard in store.pending_shards() if shards is None else shards:
        attempt = uuid.uuid4().hex[:12]
        rows = store.shard_rows(shard)
        results = []
        kept = store.spec.kept_images
        with ShardWriter(store.path, store.spec.layouts, shard, attempt, len(rows), kept) as writer:
            for row in rows:
                if row in failed:
                    results.append(RowResult(row=row, reason="truncated"))
                    continue
                stored = writer.add(row - rows.start, emb_BCHW[row], picture(row) if kept else None)
                results.append(
                    RowResult(
                        row=row,
                        sha256=f"{row:064x}",
                        bytes=100 + row,
                        original_size=(30, 40),
                        resized_size=(48, 64),
                        crc32c=stored.crc32c,
                        scales_crc32c=stored.scales_crc32c,
                        kept=stored.kept,
                    )
                )
            writer.finish()
        store.commit(shard, attempt, results)
