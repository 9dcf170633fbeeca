"""Runs that keep the resized images, with the pixels that the teacher saw."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features
from precompute_command import contents

from mobilesam.precompute import PrecomputeConfig, dry_run
from mobilesam.sam import ImageError, SamError, encode_kept, load_image, refuse_keeping
from mobilesam.store import EmbeddingStore, StoreMismatch

Run = Callable[..., dict[str, Any]]


def test_every_kept_image_has_the_pixels_that_the_teacher_saw(run: Run, tmp_path: Path, photos: Path) -> None:
    (photos / "3-broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    result = run(keep_images=True, audit=2)
    assert (result["done"], result["failed"], result["audit"]["rows"]) == (7, 1, 2)
    with EmbeddingStore.open(tmp_path / "store.zarr") as store:
        assert store.spec.kept_images == "webp"
        for record in store.manifest.records("done"):
            seen = load_image((photos / record.key).read_bytes(), 64)
            kept = load_image(store.read_image(record.row), 64)
            assert kept.resized_size == seen.resized_size == record.resized_size
            assert np.array_equal(kept.pixels_HWC, seen.pixels_HWC)


def test_keeping_images_changes_no_embedding(run: Run, tmp_path: Path) -> None:
    run("with.zarr", keep_images=True)
    run("without.zarr")
    assert contents(tmp_path / "with.zarr") == contents(tmp_path / "without.zarr")


def test_an_extended_store_keeps_images_as_it_did_when_it_was_made(
    run: Run, tmp_path: Path, photos: Path
) -> None:
    run(keep_images=True, limit=4)
    assert run(extend=True)["done"] == 7
    with EmbeddingStore.open(tmp_path / "store.zarr") as store:
        assert all(store.read_image(row) for row in range(7))
    run("without.zarr")
    with pytest.raises(StoreMismatch, match="kept_images: store None, asked 'webp'"):
        run("without.zarr", keep_images=True)


def test_a_dry_run_counts_the_bytes_of_kept_images(tmp_path: Path, photos: Path) -> None:
    config = {"images": (photos,), "out": tmp_path / "s.zarr", "teacher": "vit_nano", "image_size": 64}
    needed = [dry_run(PrecomputeConfig(**config, keep_images=keep))["bytes_needed"] for keep in (False, True)]
    first = load_image(sorted(photos.iterdir())[0].read_bytes(), 64)
    assert needed[1] - needed[0] == 7 * len(encode_kept(first.pixels_HWC))


def test_a_run_that_cannot_keep_images_makes_no_store(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SamError, match="16400 pixels can't be kept"):
        refuse_keeping(16400)
    monkeypatch.setattr(features, "check", lambda name: name != "webp")
    with pytest.raises(SamError, match="without WebP"):
        run(keep_images=True)
    assert not (tmp_path / "store.zarr").exists()


def test_a_copy_with_other_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_kept(pixels_HWC)))), pixels_HWC)
    lossy = Image.Image.save
    monkeypatch.setattr(
        Image.Image, "save", lambda self, file, kind, **_: lossy(self, file, kind, quality=50)
    )
    with pytest.raises(ImageError, match="other pixels"):
        encode_kept(pixels_HWC)
