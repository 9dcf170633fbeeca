from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_store import EVERYTHING, make_spec

from mobilesam.distill import DistillConfig, Run, distill
from mobilesam.distill.checksummed_json import read_checksummed, write_checksummed
from mobilesam.sam import preprocessing_recipe, resized_size
from mobilesam.sam.teacher import load_head
from mobilesam.store import EmbeddingStore, ImageRef, RowResult, ShardWriter, encode_head

SIZE = 128
SHAPES = ((96, 128), (128, 70), (100, 100), (60, 128), (128, 128), (40, 90))


HEAD, _ = encode_head({key: value.numpy() for key, value in load_head("vit_nano", None).items()})


def make_store(
    folder: Path, name: str = "store.zarr", seed: int = 0, head: bytes = HEAD, **changes: object
) -> Path:
    """Photos of noise with made-up embeddings of them: six rows in two shards."""
    rng = np.random.default_rng(seed)
    photos = folder / f"photos-{seed}"
    photos.mkdir(parents=True)
    for i, shape in enumerate(SHAPES):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(photos / f"photo{i}.bmp")
    files = sorted(photos.iterdir())
    spec = make_spec(
        **{
            "image_size": SIZE,
            "preprocessing": preprocessing_recipe(SIZE),
            "image_root": str(photos),
            "head_sha256": hashlib.sha256(head).hexdigest(),
        }
        | changes
    )
    images = [ImageRef(key=file.name, size=file.stat().st_size) for file in files]
    with EmbeddingStore.create(folder / name, spec, images, EVERYTHING, head) as store:
        for shard in store.pending_shards():
            rows = store.shard_rows(shard)
            with ShardWriter(store.path, spec.layouts, shard, "attempt", len(rows)) as writer:
                results = [_commit_row(writer, row, rows.start, files[row], spec.grid, rng) for row in rows]
                writer.finish()
            store.commit(shard, "attempt", results)
    return folder / name


def _commit_row(
    writer: ShardWriter, row: int, start: int, file: Path, grid: int, rng: np.random.Generator
) -> RowResult:
    stored = writer.add(row - start, rng.normal(0.5, 1, (256, grid, grid)).astype(np.float32))
    height, width = SHAPES[row]
    return RowResult(
        row=row,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        bytes=file.stat().st_size,
        original_size=(height, width),
        resized_size=resized_size(height, width, grid * 16),
        crc32c=stored.crc32c,
        scales_crc32c=stored.scales_crc32c,
    )


@dataclass(frozen=True)
class World:
    """A folder in which precompute and distill have run, and which is the working directory."""

    path: Path
    store: Path
    photos: Path

    @property
    def run(self) -> Run:
        return Run.open(self.path / "runs" / "latest")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Several threads wait for each other at every small step, for long where the cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def finished_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained once for all tests; they work on copies."""
    folder = tmp_path_factory.mktemp("world")
    store = make_store(folder)
    with contextlib.chdir(folder):
        # In float32, which is not the default on every CPU: results are compared with computations in it.
        distill(
            DistillConfig(
                store=store, epochs=2, batch_size=2, val_fraction=0.4, device="cpu", precision="float32"
            )
        )
    return folder


@pytest.fixture
def world(finished_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A copy of the finished world that a test may damage; its run knows the copied store and photos."""
    folder = tmp_path / "world"
    shutil.copytree(finished_world, folder, symlinks=True)
    for config in (folder / "runs").glob("*/config.json"):
        moved = json.dumps(read_checksummed(config)).replace(str(finished_world), str(folder))
        write_checksummed(config, json.loads(moved))
    monkeypatch.chdir(folder)
    return World(path=folder, store=folder / "store.zarr", photos=folder / "photos-0")


@pytest.fixture
def plain_store() -> Callable[..., Path]:
    """Makes a store in a folder of its own: plain_store(folder, seed=..., ...)."""
    return make_store


@pytest.fixture
def other_store(world: World) -> Callable[..., Path]:
    """Makes another store beside the world's, of other photos."""

    def make(**changes: object) -> Path:
        return make_store(world.path, name="other.zarr", seed=1, **changes)

    return make
