"""Stores that benchmarks make without a teacher."""

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
EVERYTHING = Selection(fraction=1.0, seed=0, limit=None)
ROUGHLY_A_SAM_EMBEDDING = 0.1
"""Standard deviation of made values."""


def made_spec(image_size: int, image_root: Path, dtype: str = "float16") -> tuple[StoreSpec, bytes]:
    """The spec of a store in shards of 64, and the head that belongs to it."""
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


def made_embedding(generator: np.random.Generator, image_size: int = 1024) -> np.ndarray:
    """Normally distributed values as large as a SAM embedding's, float32 (256, g, g) with g = image_size / 16."""
    shape = (256, image_size // 16, image_size // 16)
    return generator.standard_normal(shape, np.float32) * np.float32(ROUGHLY_A_SAM_EMBEDDING)


def make_photo_store(
    path: Path, photos: Path, image_size: int, *, dtype: str = "float16", keep_images: bool = False
) -> Path:
    """A store of the images in a folder, every one committed with a made embedding, and kept where that is wanted.
    Returns `path`."""
    spec, head = made_spec(image_size, photos.absolute(), dtype)
    spec = replace(spec, kept_images=KEPT_KIND if keep_images else None)
    images = [ImageRef(key=file.key, size=file.size) for file in list_images([photos]).files]
    generator = np.random.default_rng(0)
    with EmbeddingStore.create(path, spec, images, EVERYTHING, head) as store:
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
    stored = writer.add(slot, made_embedding(generator, spec.image_size), kept)
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
