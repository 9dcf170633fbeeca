"""Stores with random embeddings, written without a teacher."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np

from mobilesam.sam import KEPT_KIND, encode_kept, list_images, load_image, preprocessing_recipe
from mobilesam.store import (
    EmbeddingStore,
    ImageRef,
    RowResult,
    Selection,
    ShardWriter,
    StoreSpec,
    encode_head,
)

SHARD_SIZE = 64
ALL_IMAGES = Selection(fraction=1.0, seed=0, limit=None)
EMBEDDING_STD = 0.1
"""Standard deviation of random embeddings' values, about that of SAM's embeddings."""


def synthetic_spec(image_size: int, image_root: Path, dtype: str = "float16") -> tuple[StoreSpec, bytes]:
    """Return the spec of a store with shards of 64 rows, and the head that belongs to it."""
    head, head_sha256 = encode_head({"mask_decoder.w": np.zeros(3, np.float32)})
    spec = StoreSpec(
        store_id=uuid.uuid4().hex,
        teacher="vit_nano",
        checkpoint=None,
        checkpoint_sha256="0" * 64,
        head_sha256=head_sha256,
        positions_interpolated=False,
        image_size=image_size,
        preprocessing=preprocessing_recipe(image_size),
        dtype=dtype,
        precision="float32",
        shard_size=SHARD_SIZE,
        subset={"fraction": 1.0, "seed": 0},
        image_root=str(image_root),
        versions={},
    )
    return spec, head


def synthetic_embedding(generator: np.random.Generator, image_size: int = 1024) -> np.ndarray:
    """Return normally distributed float32 (256, g, g), g = image_size / 16, with the scale of a SAM embedding."""
    shape = (256, image_size // 16, image_size // 16)
    return generator.standard_normal(shape, np.float32) * np.float32(EMBEDDING_STD)


def make_photo_store(
    path: Path, photos: Path, image_size: int, *, dtype: str = "float16", keep_images: bool = False
) -> Path:
    """Write a store of the images in a folder, each committed with a random embedding; return `path`.

    Args:
        path: of the store.
        photos: folder of images.
        image_size: side of the encoder's square in pixels.
        dtype: of the embeddings.
        keep_images: keep the resized images in the store, as `precompute --keep-images` does.
    """
    spec, head = synthetic_spec(image_size, photos.absolute(), dtype)
    spec = replace(spec, kept_images=KEPT_KIND if keep_images else None)
    images = [ImageRef(key=file.key, size=file.size) for file in list_images([photos]).files]
    generator = np.random.default_rng(0)
    with EmbeddingStore.create(path, spec, images, ALL_IMAGES, head) as store:
        for shard in store.pending_shards():
            rows, attempt = store.shard_rows(shard), uuid.uuid4().hex[:12]
            with ShardWriter(path, spec.layouts, shard, attempt, len(rows), spec.kept_images) as writer:
                results = [
                    _written(writer, row, row - rows.start, photos / images[row].key, spec, generator)
                    for row in rows
                ]
                writer.finish()
            store.commit(shard, attempt, results)
    return path


def _written(
    writer: ShardWriter, row: int, slot: int, photo: Path, spec: StoreSpec, generator: np.random.Generator
) -> RowResult:
    data = photo.read_bytes()
    image = load_image(data, spec.image_size)
    kept = None if spec.kept_images is None else encode_kept(image.pixels_HWC)
    stored = writer.add(slot, synthetic_embedding(generator, spec.image_size), kept)
    return RowResult(
        row=row,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        original_size=image.original_size,
        resized_size=image.resized_size,
        crc32c=stored.crc32c,
        scales_crc32c=stored.scales_crc32c,
        kept=stored.kept,
    )
