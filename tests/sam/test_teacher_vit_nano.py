from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from segment_anything import sam_model_registry

from mobilesam.sam.modeling.head_shapes import head_shapes
from mobilesam.sam.modeling.vit import fit_positions
from mobilesam.sam.registry import TEACHERS
from mobilesam.sam.teacher import (
    embedded_sha256,
    load_teacher,
    positions_interpolated,
    read_embedded_weights,
    state_shapes,
)

NANO = TEACHERS["vit_nano"]

WEIGHTS = Path(__file__).parents[2] / "sam" / "vit_nano.safetensors"


# What stores of this teacher are of: with other weights none of them could be extended.
SHA256 = "5cab47dd4448405c11da1a1edaf1f01fa8eb377b5c047c8ee09559de93148499"


def test_the_embedded_weights_are_those_that_stores_were_made_with() -> None:
    assert embedded_sha256() == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == SHA256


def test_the_embedded_file_holds_every_weight_in_float16_and_records_what_made_it() -> None:
    with safe_open(WEIGHTS, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
        assert set(file.metadata()) == {"image_size", "seed", "step"}
    assert {key: value.shape for key, value in read_embedded_weights().items()} == state_shapes(NANO)


def test_the_embedded_weights_are_read_as_new_finite_float32_tensors_each_time() -> None:
    state, again = read_embedded_weights(), read_embedded_weights()
    for key, value in state.items():
        assert value.dtype == torch.float32
        assert bool(value.isfinite().all()), key
        value.zero_()
        assert not torch.equal(value, again[key]) or not again[key].any()


def test_the_embedded_teachers_head_has_exactly_sams_keys_and_shapes() -> None:
    official = {
        k: v.shape for k, v in sam_model_registry["vit_b"]().state_dict().items() if "image_encoder" not in k
    }
    assert head_shapes() == official
    state = read_embedded_weights()
    assert {key: value.shape for key, value in state.items() if "image_encoder" not in key} == official


def test_the_embedded_teachers_encoder_is_tiny_and_windowed_and_global_as_sams() -> None:
    encoder = NANO.encoder.build(512)
    assert 1_500_000 < sum(parameter.numel() for parameter in encoder.parameters()) < 2_000_000
    assert [(block.attn.windowed, block.attn.side) for block in encoder.blocks] == [
        (True, 14),
        (False, 32),
    ] * 2
    assert set(state_shapes(NANO)) == {f"image_encoder.{key}" for key in encoder.state_dict()} | set(
        head_shapes()
    )


@pytest.mark.parametrize("image_size", [256, 1024])
def test_positions_are_resampled_to_the_grid_and_keep_their_order(image_size: int) -> None:
    state = {
        key.removeprefix("image_encoder."): value
        for key, value in read_embedded_weights().items()
        if key.startswith("image_encoder.")
    }
    fitted, resampled = fit_positions(state, NANO.encoder, image_size)
    grid = image_size // 16
    assert resampled
    assert fitted["pos_embed"].shape == (1, grid, grid, 128)
    assert fitted["blocks.1.attn.rel_pos_h"].shape == (2 * grid - 1, 32)
    assert fitted["blocks.0.attn.rel_pos_h"].shape == (27, 32)
    # A table that rises evenly from top to bottom still does.
    ramp = torch.linspace(0, 1, 32)[None, :, None, None].expand(1, 32, 32, 128)
    fitted, _ = fit_positions(state | {"pos_embed": ramp}, NANO.encoder, image_size)
    rows = fitted["pos_embed"][0, 2:-2, 5, 0]
    steps = rows.diff()
    assert (steps > 0).all()
    assert float(steps.max() / steps.min()) < 1.2


def test_the_trained_image_size_needs_no_resampling() -> None:
    for image_size in (512, 256):
        told = positions_interpolated("vit_nano", image_size)
        assert load_teacher("vit_nano", None, image_size=image_size).positions_interpolated == told
        assert told == (image_size != 512)


@pytest.fixture(scope="module")
def embeddings(photo_pixels_BCHW: torch.Tensor) -> torch.Tensor:
    teacher = load_teacher("vit_nano", None, image_size=256)
    assert teacher.checkpoint_sha256 == embedded_sha256()
    return teacher.embed(photo_pixels_BCHW)


@pytest.fixture(scope="module")
def photo_pixels_BCHW(photos: dict[str, bytes]) -> torch.Tensor:
    from mobilesam.sam.photos.preprocess import load_image, normalize_and_pad, place_on_canvas

    images = [load_image(data, 256) for data in photos.values()]
    canvas = np.zeros((len(images), 256, 256, 3), np.uint8)
    for image, square in zip(images, canvas, strict=True):
        place_on_canvas(image, square)
    sizes = torch.tensor([image.resized_size for image in images])
    return normalize_and_pad(torch.from_numpy(canvas), sizes)


def test_embeddings_vary_over_an_image(embeddings: torch.Tensor) -> None:
    within = embeddings.var(dim=(2, 3), correction=0).mean(dim=1)
    assert within.min() > 0.05


def test_photos_differ_by_more_than_what_all_have_in_common(embeddings: torch.Tensor) -> None:
    common = embeddings.mean(dim=0).square().mean() / embeddings.square().mean()
    assert common < 0.5


def test_positions_alone_do_not_decide_the_embedding(photo_pixels_BCHW: torch.Tensor) -> None:
    teacher = load_teacher("vit_nano", None, image_size=256)
    embedding = teacher.embed(photo_pixels_BCHW[:2])
    teacher.image_encoder.pos_embed.zero_()
    moved = (teacher.embed(photo_pixels_BCHW[:2]) - embedding).square().mean() / embedding.var()
    assert 1e-4 < moved < 0.2


def test_a_small_change_of_the_picture_changes_the_embedding_little(photo_pixels_BCHW: torch.Tensor) -> None:
    teacher = load_teacher("vit_nano", None, image_size=256)
    noise = torch.randn(photo_pixels_BCHW[:2].shape, generator=torch.Generator().manual_seed(8))
    embedding = teacher.embed(photo_pixels_BCHW[:2])
    moved = teacher.embed(photo_pixels_BCHW[:2] + 0.02 * noise) - embedding
    assert moved.square().mean() / embedding.var() < 0.01
