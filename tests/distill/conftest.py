from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photo_store import make_photo_store
from PIL import Image
from small_student import registered_small_student

from mobilesam.distill import DistillConfig

MakeStore = Callable[..., Path]
SIZES = [(40, 60), (64, 64), (60, 30), (20, 64), (64, 50), (33, 64)]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go to runs/ below the current directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="session")
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
    are committed as failed; with `commit=False` everything stays pending. `head` is none that works where None.
    """

    def make(
        images: Path,
        *,
        image_size: int = 64,
        embeddings: np.ndarray | None = None,
        dtype: str = "float16",
        failed: Sequence[int] = (),
        commit: bool = True,
        head: dict[str, np.ndarray] | None = None,
    ) -> Path:
        path = tmp_path_factory.mktemp("store") / "store.zarr"
        if embeddings is None:
            grid, rows = image_size // 16, len(list(images.iterdir()))
            embeddings = np.random.default_rng(1).standard_normal((rows, 256, grid, grid), np.float32)
        make_photo_store(
            path,
            images,
            head=head or {"mask_decoder.w": np.zeros(3, np.float32)},
            embeddings=embeddings,
            image_size=image_size,
            dtype=dtype,
            failed=failed,
            commit=commit,
        )
        return path

    return make


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


@pytest.fixture(scope="module")
def small() -> Iterator[str]:
    """The name of a student that costs nothing, for tests in which any student would do."""
    with registered_small_student() as name:
        yield name
