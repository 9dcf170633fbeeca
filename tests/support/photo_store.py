"""Store of the pictures in a folder, committed without precompute."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from small_store import EVERYTHING, make_spec

from mobilesam.sam import load_image, preprocessing_recipe
from mobilesam.store import EmbeddingStore, ImageRef, RowResult, ShardWriter, encode_head


def make_photo_store(
    path: Path,
    images: Path,
    *,
    head: dict[str, np.ndarray],
    embeddings: np.ndarray,
    image_size: int = 64,
    dtype: str = "float16",
    failed: Sequence[int] = (),
    commit: bool = True,
) -> None:
    """Write a store of one shard.

    Args:
        path: Store to create.
        images: Folder of pictures.
        head: SAM head to keep in the store.
        embeddings: (n, 256, g, g), in the order of the sorted file names.
        image_size: Side of the encoder's square, pixels.
        dtype: Stored dtype.
        failed: Rows that are committed as failed.
        commit: False leaves all rows pending.
    """
    files = sorted(images.iterdir())
    data, head_sha256 = encode_head(head)
    spec = make_spec(
        head_sha256=head_sha256,
        image_size=image_size,
        preprocessing=preprocessing_recipe(image_size),
        dtype=dtype,
        shard_size=len(files),
        image_root=str(images),
        checkpoint_sha256="0" * 64,
        versions={},
    )
    listed = [ImageRef(key=file.name, size=file.stat().st_size) for file in files]
    with EmbeddingStore.create(path, spec, listed, EVERYTHING, data) as store:
        if commit:
            _commit(store, files, embeddings, failed)


def _commit(store: EmbeddingStore, files: list[Path], embeddings: np.ndarray, failed: Sequence[int]) -> None:
    results = []
    with ShardWriter(store.path, store.spec.layouts, 0, "a", len(files)) as writer:
        for row, file in enumerate(files):
            if row in failed:
                results.append(RowResult(row=row, reason="made to fail"))
                continue
            data = file.read_bytes()
            image = load_image(data, store.spec.image_size)
            stored = writer.add(row, embeddings[row])
            results.append(
                RowResult(
                    row=row,
                    sha256=hashlib.sha256(data).hexdigest(),
                    bytes=len(data),
                    original_size=image.original_size,
                    resized_size=image.resized_size,
                    crc32c=stored.crc32c,
                    scales_crc32c=stored.scales_crc32c,
                )
            )
        writer.finish()
    store.commit(0, "a", results)
