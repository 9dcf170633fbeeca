"""Write a copy of a store in which each image has the embedding of another image.

    python examples/shuffled_store.py --store store.zarr --out shuffled.zarr --seed 0

A student trained on it can learn what embeddings have in common, but nothing about its own images: its score is the
baseline of a comparison of masks.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mobilesam.store import EmbeddingStore, ImageRecord, ImageRef, RowResult, Selection, ShardWriter


def derangement(count: int, seed: int) -> list[int]:
    """Return a random permutation of `count` places without fixed points: one cycle through all of them."""
    if count < 2:
        raise ValueError(f"{count} image(s) cannot be shuffled: give at least 2")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    places = np.empty(count, dtype=int)
    places[order] = np.roll(order, 1)
    return places.tolist()


def shuffle_store(source: Path, out: Path, seed: int) -> None:
    """Write the store `out` from the committed rows of `source`, of any dtype; images stay where they are.

    `out` appears only when it is complete.

    Raises:
        FileExistsError: `out` exists.
        ValueError: The store has a single image.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already")
    draft = out.with_name(f"{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    with EmbeddingStore.open(source) as store:
        records = store.manifest.records("done")
        spec = dataclasses.replace(store.spec, store_id=uuid.uuid4().hex, kept_images=None)
        images = [ImageRef(key=each.key, size=each.size, offset=each.offset) for each in records]
        everything = Selection(fraction=1.0, seed=0, limit=None)
        places = derangement(len(records), seed)
        with EmbeddingStore.create(draft, spec, images, everything, store.read_head()) as shuffled:
            for shard in shuffled.pending_shards():
                _fill(shuffled, shard, store, records, places)
    draft.rename(out)


def _fill(
    shuffled: EmbeddingStore,
    shard: int,
    store: EmbeddingStore,
    records: Sequence[ImageRecord],
    places: Sequence[int],
) -> None:
    rows = shuffled.shard_rows(shard)
    attempt, results = uuid.uuid4().hex[:12], []
    with ShardWriter(shuffled.path, shuffled.spec.layouts, shard, attempt, len(rows)) as writer:
        for row in rows:
            (emb_CHW,) = store.read([records[places[row]].row]).to_float32()
            stored = writer.add(row - rows.start, emb_CHW)
            record = records[row]
            result = RowResult(
                row=row,
                sha256=record.sha256,
                bytes=record.bytes,
                original_size=record.original_size,
                resized_size=record.resized_size,
                crc32c=stored.crc32c,
                scales_crc32c=stored.scales_crc32c,
            )
            results.append(result)
        writer.finish()
    shuffled.commit(shard, attempt, results)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True, metavar="STORE")
    parser.add_argument("--out", type=Path, required=True, metavar="STORE")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    options = parser.parse_args()
    shuffle_store(options.store, options.out, options.seed)
    print(f"{options.out} has the images of {options.store}, each with another one's embedding")


if __name__ == "__main__":
    main()
