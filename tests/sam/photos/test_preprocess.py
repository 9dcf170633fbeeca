from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

from mobilesam.sam import (
    DecodedImage,
    ImageError,
    decode_image,
    load_image,
    normalize_and_pad,
    place_on_canvas,
    preprocessing_recipe,
    resize_longest_side,
    resized_size,
    valid_cells,
)


def upstream_pixels(image_HWC: np.ndarray, image_size: int) -> torch.Tensor:
    """What SamPredictor.set_image feeds to the encoder, by segment_anything's own code: (1, 3, S, S)."""
    encoder = torch.nn.Identity()
    encoder.img_size = image_size
    sam = Sam(encoder, torch.nn.Identity(), torch.nn.Identity())
    resized = ResizeLongestSide(image_size).apply_image(image_HWC)
    return sam.preprocess(torch.as_tensor(resized).permute(2, 0, 1).contiguous()[None])


def our_pixels(image: DecodedImage, image_size: int, background: int = 0) -> torch.Tensor:
    canvas = np.full((image_size, image_size, 3), background, np.uint8)
    height, width = image.resized_size
    canvas[:height, :width] = image.pixels_HWC
    return normalize_and_pad(torch.from_numpy(canvas)[None], torch.tensor([image.resized_size]))


@pytest.mark.parametrize("image_size", [256, 1024])
def test_every_photo_reaches_the_encoder_with_the_bits_that_segment_anything_gives(
    photos: dict[str, bytes], image_size: int
) -> None:
    for name, data in photos.items():
        image = load_image(data, image_size)
        assert image.original_size == decode_image(data).shape[:2]
        expected = upstream_pixels(decode_image(data), image_size)
        assert torch.equal(our_pixels(image, image_size), expected), name


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    size=st.sampled_from([64, 256]),
    seed=st.integers(0, 2**32),
)
def test_any_shape_reaches_the_encoder_with_the_bits_that_segment_anything_gives(
    height: int, width: int, size: int, seed: int
) -> None:
    if min(height, width) * size / max(height, width) < 0.5:
        return  # vanishes when resized: a test of its own
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    resized = resize_longest_side(pixels, size)
    image = DecodedImage(pixels_HWC=resized, original_size=(height, width), resized_size=resized.shape[:2])
    assert torch.equal(our_pixels(image, size, background=99), upstream_pixels(pixels, size))


@given(height=st.integers(1, 100_000), width=st.integers(1, 100_000), size=st.sampled_from([256, 512, 1024]))
def test_sizes_round_as_segment_anything_rounds_them(height: int, width: int, size: int) -> None:
    expected = ResizeLongestSide.get_preprocess_shape(height, width, size)
    if min(expected) == 0:
        with pytest.raises(ImageError, match="too thin"):
            resized_size(height, width, size)
    else:
        assert resized_size(height, width, size) == expected


def test_a_photo_of_sa_1b_fills_43_rows_of_the_grid() -> None:
    assert resized_size(1500, 2250) == (683, 1024)
    cells = valid_cells((683, 1024))
    assert cells.shape == (64, 64)
    assert cells[:43].all()
    assert not cells[43:].any()


def test_an_image_too_thin_to_resize_is_refused_with_both_sizes(encode: Callable[..., bytes]) -> None:
    data = encode(np.zeros((1, 3000, 3), np.uint8), "PNG")
    with pytest.raises(ImageError, match="too thin: 3000 x 1 pixels would be resized to 1024 x 0"):
        load_image(data, 1024)


@given(height=st.integers(1, 256), width=st.integers(1, 256))
def test_a_cell_is_valid_if_the_pixel_at_its_centre_is_image(height: int, width: int) -> None:
    canvas = np.zeros((256, 256), bool)
    canvas[:height, :width] = True
    expected = canvas[8::16, 8::16]
    cells = valid_cells((height, width), 256)
    if height > 8 and width > 8:
        assert np.array_equal(cells, expected)
    assert cells[0, 0]


def test_padding_is_exactly_zero_whatever_the_canvas_held_before() -> None:
    canvas = torch.full((2, 64, 64, 3), 200, dtype=torch.uint8)
    pixels = normalize_and_pad(canvas, torch.tensor([[64, 20], [33, 64]]))
    assert (pixels[0, :, :, 20:] == 0).all()
    assert (pixels[1, :, 33:] == 0).all()
    assert (pixels[0, :, :, :20] != 0).all()
    assert (pixels[1, :, :33] != 0).all()
    assert not torch.signbit(pixels[0, :, :, 20:]).any()


def test_each_image_of_a_batch_is_normalised_as_if_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    canvas = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[32, 9], [1, 32], [32, 32]], dtype=torch.int32)
    together = normalize_and_pad(canvas, sizes)
    alone = torch.cat([normalize_and_pad(canvas[i : i + 1], sizes[i : i + 1]) for i in range(3)])
    assert torch.equal(together, alone)
    assert together.dtype == torch.float32
    assert together.is_contiguous()


def test_normalising_leaves_the_canvas_alone() -> None:
    canvas = torch.full((1, 16, 16, 3), 7, dtype=torch.uint8)
    normalize_and_pad(canvas, torch.tensor([[4, 4]]))
    assert (canvas == 7).all()


@pytest.mark.parametrize("size", [(2, 8), (8, 2)])
def test_placing_writes_the_image_and_black_beyond_it(size: tuple[int, int]) -> None:
    canvas = np.full((8, 8, 3), 5, np.uint8)
    pixels = np.ones((*size, 3), np.uint8)
    place_on_canvas(DecodedImage(pixels_HWC=pixels, original_size=size, resized_size=size), canvas)
    assert (canvas[: size[0], : size[1]] == 1).all()
    assert canvas.sum() == pixels.sum()


def test_the_recipe_survives_json_and_tells_image_sizes_apart() -> None:
    recipe = preprocessing_recipe(256)
    assert json.loads(json.dumps(recipe)) == recipe
    assert recipe != preprocessing_recipe(1024)


@pytest.mark.cuda
def test_normalising_on_cuda_gives_the_bits_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    canvas = torch.randint(0, 256, (2, 1024, 1024, 3), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[683, 1024], [1024, 300]])
    assert torch.equal(normalize_and_pad(canvas.cuda(), sizes).cpu(), normalize_and_pad(canvas, sizes))
