"""Stored embeddings equal those of segment_anything's own predictor with the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from official_checkpoints import write_checkpoint
from PIL import Image
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import Sam
from upstream_vit import upstream_vit

from mobilesam.sam.device import cpu_accelerates_bfloat16
from mobilesam.sam.modeling.head import SamHead
from mobilesam.sam.teacher import load_teacher
from mobilesam.store import EmbeddingStore

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
Run = Callable[..., dict[str, Any]]


def _predicted(sam: Sam, photo: Path) -> np.ndarray:
    """segment_anything's embedding of a photo, float32 (256, grid, grid)."""
    predictor = SamPredictor(sam)
    with torch.no_grad():
        predictor.set_image(np.asarray(Image.open(photo).convert("RGB")))
    return predictor.get_image_embedding()[0].numpy()


def _stored(path: Path, key: str) -> np.ndarray:
    with EmbeddingStore.open(path) as store:
        (row,) = [record.row for record in store.manifest.records() if record.key == key]
        return store.read([row]).to_float32()[0]


def _assert_near(stored: np.ndarray, predicted: np.ndarray, precision: str, tolerance: float) -> None:
    if precision == "bfloat16":
        cosine = torch.cosine_similarity(torch.from_numpy(stored), torch.from_numpy(predicted), dim=0)
        assert cosine.mean() >= 0.9999
    else:
        assert np.abs(stored - predicted).max() <= tolerance * np.ptp(predicted)


def _nano(image_size: int) -> Sam:
    """Sam of segment_anything around its own encoder class, with vit_nano's weights."""
    encoder = upstream_vit("vit_nano", image_size)
    encoder.load_state_dict(load_teacher("vit_nano", None, image_size=image_size).image_encoder.state_dict())
    head = SamHead(image_size)
    return Sam(encoder, head.prompt_encoder, head.mask_decoder)


CASES = [("float32", "float32", 1e-4), ("float16", "float32", 5e-4), ("float32", "bfloat16", 0.0)]


@pytest.mark.parametrize(("dtype", "precision", "tolerance"), CASES)
def test_a_stored_embedding_matches_the_predictors(
    run: Run, tmp_path: Path, dtype: str, precision: str, tolerance: float
) -> None:
    run(images=(PHOTOS,), limit=6, image_size=256, dtype=dtype, precision=precision)
    sam = _nano(256)
    for key in ("astronaut.jpg", "brick.png", "admiral.jpg"):
        stored = _stored(tmp_path / "store.zarr", key)
        _assert_near(stored, _predicted(sam, PHOTOS / key), precision, tolerance)


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "precision", "tolerance"), CASES)
def test_a_stored_vit_b_embedding_matches_the_predictors_at_1024(
    run: Run, tmp_path: Path, dtype: str, precision: str, tolerance: float
) -> None:
    if precision == "bfloat16" and not cpu_accelerates_bfloat16():
        pytest.skip("emulated bfloat16 would take an hour here; tests/sam has it at 256 pixels")
    state = write_checkpoint("vit_b", tmp_path / "vit_b.pth")
    run(
        images=(PHOTOS,), limit=1, image_size=1024, teacher="vit_b", checkpoint=tmp_path / "vit_b.pth",
        dtype=dtype, precision=precision,
    )  # fmt: skip
    sam = sam_model_registry["vit_b"]()
    sam.load_state_dict(state)
    stored = _stored(tmp_path / "store.zarr", "admiral.jpg")
    _assert_near(stored, _predicted(sam, PHOTOS / "admiral.jpg"), precision, tolerance)


@pytest.mark.long
def test_a_stored_vit_h_embedding_matches_the_predictors_at_1024(run: Run, tmp_path: Path) -> None:
    state = write_checkpoint("vit_h", tmp_path / "vit_h.pth")
    result = run(
        images=(PHOTOS,), limit=1, image_size=1024, teacher="vit_h", checkpoint=tmp_path / "vit_h.pth",
        dtype="float32", precision="float32",
    )  # fmt: skip
    assert result["done"] == 1
    sam = sam_model_registry["vit_h"]()
    sam.load_state_dict(state)
    stored = _stored(tmp_path / "store.zarr", "admiral.jpg")
    _assert_near(stored, _predicted(sam, PHOTOS / "admiral.jpg"), "float32", 1e-4)
