from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mobilesam.distill import DistillConfig
from mobilesam.sam import load_image, preprocessing_recipe
from mobilesam.store import (
    EmbeddingStore,
    NewImage,
    RowResult,
    Selection,
    ShardWriter,
    StoreSpec,
    encode_head,
)

MakeStore = Callable[..., Path]
SIZES = [(40, 60), (64, 64), (60, 30), (20, 64), (64, 50), (33, 64)]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go to runs/ below the current directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def save_images(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """save_images(sizes) -> a folder of PNGs of smooth noise, one for each (height, width)."""

    def save(sizes: Sequence[tuple[int, int]], seed: int = 0) -> Path:
        folder = tmp_path_factory.mktemp("images")
        rng = np.random.default_rng(seed)
        for number, (height, width) in enumerate(sizes):
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
        return folder

    return save


@pytest.fixture(scope="session")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    """make_store(images, ...) -> a store of the images in a folder, committed without precompute.

    `embeddings` (n, 256, g, g), in the order of the sorted file names, are random where None. Rows named in `failed`
    are committed as failed; with `commit=False` everything stays pending.
    """

    def make(
        images: Path,
        *,
        image_size: int = 64,
        embeddings: np.ndarray | None = None,
        dtype: str = "float16",
        failed: Sequence[int] = (),
        commit: bool = True,
    ) -> Path:
        path = tmp_path_factory.mktemp("store") / "store.zarr"
        files = sorted(images.iterdir())
        if embeddings is None:
            grid = image_size // 16
            embeddings = np.random.default_rng(1).standard_normal((len(files), 256, grid, grid), np.float32)
        head, head_sha256 = encode_head({"mask_decoder.w": np.zeros(3, np.float32)})
        spec = StoreSpec(
            store_id=uuid.uuid4().hex,
            teacher="vit_nano",
            checkpoint=None,
            checkpoint_sha256="0" * 64,
            head_sha256=head_sha256,
            untrained=True,
            positions_interpolated=True,
            image_size=image_size,
            preprocessing=preprocessing_recipe(image_size),
            dtype=dtype,
            precision="float32",
            shard_size=len(files),
            subset={"fraction": 1.0, "seed": 0},
            image_root=str(images),
            versions={},
        )
        listed = [NewImage(key=file.name, size=file.stat().st_size) for file in files]
        selection = Selection(fraction=1.0, seed=0, limit=None)
        with EmbeddingStore.create(path, spec, listed, selection, head) as store:
            if commit:
                _commit(store, files, embeddings, failed)
        return path

    return make


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


@pytest.fixture(scope="session")
def images(save_images: Callable[..., Path]) -> Path:
    """Six pictures of different sizes; tests that change files make their own."""
    return save_images(SIZES)


@pytest.fixture(scope="session")
def store(images: Path, make_store: MakeStore) -> Path:
    """Their store, at 64 pixels, with random embeddings."""
    return make_store(images)


@pytest.fixture(scope="session")
def options() -> Callable[..., DistillConfig]:
    """options(store, ...) -> two epochs of two images a step, on the CPU in float32."""

    def make(store: Path, **changes: Any) -> DistillConfig:
        values = {"epochs": 2, "batch_size": 2, "device": "cpu", "precision": "float32", **changes}
        return DistillConfig(store=store, **values)

    return make
