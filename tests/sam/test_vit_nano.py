from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from segment_anything import sam_model_registry

from mobilesam.sam.head_shapes import head_shapes
from mobilesam.sam.teachers import load_teacher, positions_interpolated
from mobilesam.sam.vit import VITS, build_vit, fit_positions
from mobilesam.sam.vit_nano import shapes, state_sha256, untrained_sha256, untrained_state

PINNED = "1dc76d0b89813f57ff67bdcaed701db9585cbdb4d21ac926d00ee8766a1328e4"


def test_the_weights_are_the_same_bytes_on_every_machine() -> None:
    assert untrained_sha256() == PINNED


def test_the_digest_is_of_keys_shapes_and_bytes_in_sorted_order() -> None:
    state = {"b": torch.tensor([1.0, -2.0]), "a": torch.zeros(1, 1)}
    content = b"a (1, 1)\n" + bytes(4) + b"b (2,)\n" + np.array([1, -2], "<f4").tobytes()
    assert state_sha256(state) == hashlib.sha256(content).hexdigest()


def test_a_weight_can_be_recomputed_from_the_recipe_by_hand() -> None:
    key = "image_encoder.blocks.0.attn.qkv.weight"
    seed = int.from_bytes(hashlib.sha256(f"vit_nano/1/{key}".encode()).digest()[:8], "big")
    integers = [int(value) >> 40 for value in np.random.PCG64(seed).random_raw(3)]
    bound = np.float32(math.sqrt(3) / math.sqrt(128))
    wanted = [float(np.float32((value - 2**23) / 2**23) * bound) for value in integers]
    assert untrained_state()[key].flatten()[:3].tolist() == wanted


def test_its_head_has_exactly_sams_keys_and_shapes() -> None:
    official = {
        k: v.shape for k, v in sam_model_registry["vit_b"]().state_dict().items() if "image_encoder" not in k
    }
    assert head_shapes() == official
    state = untrained_state()
    assert {key: value.shape for key, value in state.items() if "image_encoder" not in key} == official


def test_its_encoder_is_tiny_and_windowed_and_global_as_sams() -> None:
    encoder = build_vit("vit_nano", 512)
    assert 1_500_000 < sum(parameter.numel() for parameter in encoder.parameters()) < 2_000_000
    assert [(block.attn.windowed, block.attn.side) for block in encoder.blocks] == [
        (True, 14),
        (False, 32),
    ] * 2
    assert set(shapes()) == {f"image_encoder.{key}" for key in encoder.state_dict()} | set(head_shapes())


def test_norms_start_neutral_and_every_other_weight_is_spread_evenly() -> None:
    for key, value in untrained_state().items():
        assert value.dtype == torch.float32
        if value.dim() == 1 and key.endswith("weight"):
            assert (value == 1).all(), key
        elif value.dim() == 1 and not key.endswith("proj.bias"):
            assert (value == 0).all(), key
        elif value.numel() >= 5000 and not key.endswith(("patch_embed.proj.weight", "neck.2.weight")):
            # Uniform: standard deviation is the bound over sqrt(3), the mean is near 0.
            assert abs(float(value.std() * math.sqrt(3) / value.abs().max()) - 1) < 0.02, key
            assert abs(float(value.mean() / value.std())) < 0.05, key


def test_a_patch_is_seen_as_two_by_two_blocks_of_one_colour() -> None:
    weight = untrained_state()["image_encoder.patch_embed.proj.weight"]
    blocks = weight[:, :, ::8, ::8]
    assert torch.equal(weight, blocks.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3))
    assert len(blocks.unique()) == blocks.numel()


def test_the_necks_cells_speak_mainly_of_themselves() -> None:
    deviations = untrained_state()["image_encoder.neck.2.weight"].std(dim=(0, 1))
    wanted = torch.tensor([[1, 4, 1], [4, 16, 4], [1, 4, 1]]) / 16
    torch.testing.assert_close(deviations / deviations[1, 1], wanted, rtol=0.02, atol=0)


def test_no_two_weights_share_their_numbers() -> None:
    starts = [value.flatten()[:4] for value in untrained_state().values() if value.dim() > 1]
    normalised = {tuple((start / start[0]).tolist()) for start in starts}
    assert len(normalised) == len(starts)


@pytest.mark.parametrize("image_size", [256, 1024])
def test_positions_resample_to_the_grid_and_keep_what_they_say(image_size: int) -> None:
    state = {
        key.removeprefix("image_encoder."): value
        for key, value in untrained_state().items()
        if key.startswith("image_encoder.")
    }
    fitted, resampled = fit_positions(state, VITS["vit_nano"], image_size)
    grid = image_size // 16
    assert resampled
    assert fitted["pos_embed"].shape == (1, grid, grid, 128)
    assert fitted["blocks.1.attn.rel_pos_h"].shape == (2 * grid - 1, 32)
    assert fitted["blocks.0.attn.rel_pos_h"].shape == (27, 32)
    # A table that rises evenly from top to bottom still does.
    ramp = torch.linspace(0, 1, 32)[None, :, None, None].expand(1, 32, 32, 128)
    fitted, _ = fit_positions(state | {"pos_embed": ramp}, VITS["vit_nano"], image_size)
    rows = fitted["pos_embed"][0, 2:-2, 5, 0]
    steps = rows.diff()
    assert (steps > 0).all()
    assert float(steps.max() / steps.min()) < 1.2


def test_the_stored_size_needs_no_resampling() -> None:
    for image_size in (512, 256):
        told = positions_interpolated("vit_nano", image_size)
        assert load_teacher("vit_nano", None, image_size=image_size).positions_interpolated == told
        assert told == (image_size != 512)


@pytest.fixture(scope="module")
def embeddings(photo_pixels_BCHW: torch.Tensor) -> torch.Tensor:
    teacher = load_teacher("vit_nano", None, image_size=256)
    assert teacher.untrained
    assert teacher.checkpoint_sha256 == untrained_sha256()
    return teacher.embed(photo_pixels_BCHW)


@pytest.fixture(scope="module")
def photo_pixels_BCHW(photos: dict[str, bytes]) -> torch.Tensor:
    from mobilesam.sam.images import load_image, place_on_canvas
    from mobilesam.sam.normalize import normalize_and_pad

    images = [load_image(data, 256) for data in photos.values()]
    canvas = np.zeros((len(images), 256, 256, 3), np.uint8)
    for image, square in zip(images, canvas, strict=True):
        place_on_canvas(image, square)
    sizes = torch.tensor([image.resized_size for image in images])
    return normalize_and_pad(torch.from_numpy(canvas), sizes)


def test_embeddings_vary_over_an_image(embeddings: torch.Tensor) -> None:
    within = embeddings.var(dim=(2, 3), correction=0).mean(dim=1)
    assert within.min() > 0.1


def test_photos_differ_by_more_than_what_all_have_in_common(embeddings: torch.Tensor) -> None:
    common = embeddings.mean(dim=0).square().mean() / embeddings.square().mean()
    assert common < 0.4


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
