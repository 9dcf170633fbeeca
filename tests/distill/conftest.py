from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go to runs/ below the current directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def save_images(tmp_path: Path) -> Callable[..., Path]:
    """save_images(sizes) -> a folder of PNGs of smooth noise, one for each (height, width)."""

    def save(sizes: Sequence[tuple[int, int]], name: str = "images", seed: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(seed)
        for number, (height, width) in enumerate(sizes):
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
        return folder

    return save


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
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
        name: str = "store.zarr",
    ) -> Path:
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
        with EmbeddingStore.create(tmp_path / name, spec, listed, selection, head) as store:
            if commit:
                _commit(store, files, embeddings, failed)
        return tmp_path / name

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


@pytest.fixture
def png_bytes() -> Callable[[np.ndarray], bytes]:
    """png_bytes(uint8 HWC) -> the bytes of a PNG file."""

    def encode(image_HWC: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image_HWC).save(buffer, "PNG")
        return buffer.getvalue()

    return encode
