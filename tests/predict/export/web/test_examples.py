"""Pictures that the page offers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilesam.common.errors import ImageError
from mobilesam.predict.export.web.examples import read_examples

PHOTOS = Path(__file__).parents[4] / "examples" / "photos"


def test_photos_are_turned_made_smaller_and_stripped_of_what_a_camera_writes(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    exif.get_ifd(0x8825)[1] = "N"  # a place
    Image.new("RGB", (2400, 1200), (250, 20, 30)).save(tmp_path / "my cat.jpg", exif=exif)
    (found,) = read_examples([tmp_path / "my cat.jpg"])
    picture = Image.open(io.BytesIO(found.data))
    assert found.size == picture.size == (800, 1600)
    assert found.text == "my cat"
    assert not picture.getexif()
    assert b"Exif" not in found.data


def test_a_photo_keeps_its_size_and_nearly_its_pixels() -> None:
    (found,) = read_examples([PHOTOS / "coffee.jpg"])
    given = np.asarray(Image.open(PHOTOS / "coffee.jpg").convert("RGB"), dtype=int)
    assert np.abs(np.asarray(Image.open(io.BytesIO(found.data)), dtype=int) - given).mean() < 3


def test_without_photos_there_is_a_drawn_picture_the_same_each_time() -> None:
    (first,), (second,) = read_examples([]), read_examples([])
    assert first == second
    pixels = np.asarray(Image.open(io.BytesIO(first.data)))
    assert pixels.shape == (640, 960, 3)
    assert "ball" in first.text
    red = pixels[420, 520].astype(int)
    assert red[0] > red[1] + 60, "the ball's middle is red"


@pytest.mark.parametrize("name", ["nothing.jpg", "text.jpg"])
def test_a_file_that_is_no_photo_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no photo")
    with pytest.raises(ImageError, match=f"--examples .*{name}"):
        read_examples([tmp_path / name])
