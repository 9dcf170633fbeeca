"""The page's preprocessing against Pillow, torch and our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from packaging.version import Version, parse

from mobilesam.common.errors import ImageError
from mobilesam.sam import image_pixels, preprocessing_recipe, resized_size
from mobilesam.sam.photos.preprocess import DecodedImage, resize_longest_side

Node = Callable[[str], Any]


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (480, 640, 256),
        (853, 1280, 512),
        (40, 70, 64),
        (64, 64, 64),
        (64, 30, 64),
        (517, 33, 64),
        (1501, 1003, 128),
        (255, 256, 256),
        (400, 200, 64),
        (440, 200, 64),
        (360, 200, 64),
        (200, 440, 64),
    ],
)
def test_the_encoders_input_is_pythons_to_the_bit(
    height: int, width: int, size: int, node: Node, tmp_path: Path
) -> None:
    rng = np.random.default_rng(height)
    coarse = rng.integers(0, 256, (height // 9 + 1, width // 9 + 1, 3)).repeat(9, 0).repeat(9, 1)
    noise = rng.integers(-40, 40, (height, width, 3))
    photo = (coarse[:height, :width] + noise).clip(0, 255).astype(np.uint8)
    np.dstack([photo, np.full((height, width), 255, np.uint8)]).tofile(tmp_path / "rgba")
    node(f"""
        const [h, w] = preprocess.resizedSize({height}, {width}, {size});
        const rgb = preprocess.resize(new Uint8Array(fs.readFileSync("rgba")), {width}, {height}, w, h);
        fs.writeFileSync("rgb", rgb);
        const norm = {json.dumps(preprocessing_recipe(size)["normalize"])};
        const input = preprocess.encoderInput(rgb, w, h, {size}, norm);
        fs.writeFileSync("input", new Uint8Array(input.buffer));
    """)
    resized = resize_longest_side(photo, size)
    if height > 2 * width and parse(PIL.__version__) < Version("13"):
        pytest.skip("Pillow before 13 resizes rows first in tall pictures, too: a grey level of difference")
    found = np.fromfile(tmp_path / "rgb", np.uint8)
    assert np.array_equal(found.reshape(resized.shape), resized)
    image = DecodedImage(
        pixels_HWC=resized, original_size=(height, width), resized_size=(resized.shape[0], resized.shape[1])
    )
    wanted = image_pixels(image, size)
    given = torch.from_numpy(np.fromfile(tmp_path / "input", np.float32)).view_as(wanted)
    assert torch.equal(given, wanted)


def test_sizes_are_rounded_as_in_python(node: Node) -> None:
    rng = np.random.default_rng(0)
    sizes = [[int(h), int(w), int(s) * 16] for h, w, s in zip(
        rng.integers(1, 6000, 2000), rng.integers(1, 6000, 2000), rng.integers(4, 65, 2000), strict=True
    )]  # fmt: skip
    sizes += [
        [side, 2 * size, size] for size in (64, 80, 112, 336) for side in range(1, 2 * size, 2)
    ]  # halves
    found = node(f"""
        result = {json.dumps(sizes)}.map(([h, w, s]) => {{
            try {{ return preprocess.resizedSize(h, w, s); }} catch {{ return null; }}
        }});
    """)
    for (height, width, size), given in zip(sizes, found, strict=True):
        try:
            assert given == list(resized_size(height, width, size)), (height, width, size)
        except ImageError:
            assert given is None


def test_a_picture_that_is_too_thin_is_refused_in_words(node: Node) -> None:
    message = node("try { preprocess.resizedSize(1, 4000, 256); } catch (error) { result = error.message; }")
    assert message == "This picture is too thin: 4000 x 1 pixels. Choose another one."
