"""Our ViT computes segment_anything's function: outputs, gradients, and every piece of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import Tensor
from upstream_vit import randomise, upstream_encoder, upstream_vit

from mobilesam.sam import image_pixels, load_image
from mobilesam.sam.modeling import attention
from mobilesam.sam.modeling.vit import ViTEncoder, into_windows, out_of_windows
from mobilesam.sam.registry import TEACHERS

PHOTOS = Path(__file__).parents[3] / "examples" / "photos"

# Windows that fit the grid, are cut off, are larger than it; one head; a head width that is no power of two.
SIZES = [(448, 64, 4), (256, 64, 4), (64, 48, 2), (400, 40, 1), (336, 80, 2)]


def pair(image_size: int, width: int, heads: int, dtype: torch.dtype = torch.float64):
    """Upstream's encoder and ours with the same random weights."""
    theirs = upstream_encoder(image_size, width, 3, heads, (1,)).to(dtype)
    randomise(theirs, image_size)
    ours = ViTEncoder(image_size, width, 3, heads, (1,)).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def noise(image_size: int, dtype: torch.dtype = torch.float64, images: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, image_size, image_size, generator=generator, dtype=dtype)


def photo(name: str, image_size: int) -> Tensor:
    return image_pixels(load_image((PHOTOS / name).read_bytes(), image_size), image_size)


@pytest.mark.parametrize(("image_size", "width", "heads"), SIZES)
def test_the_encoder_computes_upstreams_function_in_float64(image_size: int, width: int, heads: int) -> None:
    theirs, ours = pair(image_size, width, heads)
    x = noise(image_size)
    expected = theirs(x).detach()
    torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def further_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend in the way of bfloat16 and of GPUs, whatever the dtype."""
    monkeypatch.setattr(attention, "attend_with_bias", attention.attend_with_channels)


@pytest.mark.usefixtures("further_channels")
@pytest.mark.parametrize(("image_size", "width", "heads"), SIZES)
def test_the_encoder_computes_upstreams_function_with_positions_as_channels(
    image_size: int, width: int, heads: int
) -> None:
    theirs, ours = pair(image_size, width, heads)
    x = noise(image_size)
    torch.testing.assert_close(ours(x), theirs(x).detach(), rtol=1e-10, atol=1e-10)


def test_the_encoder_computes_upstreams_function_with_the_bias_of_one_head_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "BIAS_SCORES", 1)
    theirs, ours = pair(448, 64, 4)
    x = noise(448)
    torch.testing.assert_close(ours(x), theirs(x).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("image_size", "width", "heads"), SIZES)
def test_the_encoders_gradients_are_upstreams(image_size: int, width: int, heads: int) -> None:
    theirs, ours = pair(image_size, width, heads)
    x = noise(image_size)
    weights = torch.randn(2, 256, image_size // 16, image_size // 16, dtype=torch.float64)
    for encoder in (theirs, ours):
        (encoder(x) * weights).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert expected[name].grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("name", [name for name in TEACHERS if name.startswith("vit")])
def test_the_encoders_names_and_shapes_are_upstreams(name: str) -> None:
    image_size = 512 if name == "vit_nano" else 1024
    with torch.device("meta"):
        theirs, ours = upstream_vit(name, image_size), TEACHERS[name].encoder.build(image_size)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


def test_float32_is_within_1e_4_of_upstream_on_photos() -> None:
    theirs, ours = pair(512, 128, 4, torch.float32)
    for name in ("astronaut.jpg", "brick.png"):
        x = photo(name, 512)
        with torch.no_grad():
            expected, found = theirs(x), ours(x)
        assert float((found - expected).abs().max()) <= 1e-4 * float(np.ptp(expected.numpy()))


def test_bfloat16_has_a_cosine_of_0_9999_to_upstreams_float32_on_photos() -> None:
    theirs, ours = pair(256, 128, 4, torch.float32)
    ours.hold_in_bfloat16()
    for name in ("astronaut.jpg", "brick.png"):
        x = photo(name, 256)
        with torch.no_grad():
            expected, found = theirs(x), ours(x)
        assert found.dtype == torch.float32
        assert float(torch.cosine_similarity(found, expected, dim=1).mean()) >= 0.9999


def test_norms_and_positions_of_a_bfloat16_encoder_stay_in_float32() -> None:
    encoder = ViTEncoder(64, 48, 2, 2, (1,)).hold_in_bfloat16()
    kept = {name for name, value in encoder.named_parameters() if value.dtype == torch.float32}
    assert kept == {
        name
        for name, _ in encoder.named_parameters()
        if "norm" in name or "rel_pos" in name or name == "pos_embed" or name.startswith(("neck.1", "neck.3"))
    }


@given(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_windows_are_upstreams_and_form_the_grid_again(
    batch: int, rows: int, columns: int, side: int, seed: int
) -> None:
    x_BYXC = torch.randn(batch, rows, columns, 3, generator=torch.Generator().manual_seed(seed))
    expected, padded = window_partition(x_BYXC, side)
    windows = into_windows(x_BYXC, side, torch.zeros(3))
    assert torch.equal(windows, expected)
    assert torch.equal(out_of_windows(windows, x_BYXC.shape[:3]), x_BYXC)
    assert torch.equal(window_unpartition(windows, side, padded, (rows, columns)), x_BYXC)


def test_cells_beyond_the_grid_have_the_given_value() -> None:
    windows = into_windows(torch.zeros(1, 3, 2, 2), 2, torch.tensor([5.0, 7.0]))
    assert windows.shape == (2, 2, 2, 2)
    assert torch.equal(windows[0], torch.zeros(2, 2, 2))
    assert torch.equal(windows[1, 1], torch.tensor([[5.0, 7.0], [5.0, 7.0]]))
