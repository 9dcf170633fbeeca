"""TIFFs of satellites and microscopes: bands without colours, planes, and layouts that are refused by their names."""

from __future__ import annotations

import numpy as np
import pytest
from tiff_writer import write_tiff

from mobilesam.sam import ImageError, decode_image
from mobilesam.sam.photos import image_decode


@pytest.fixture(scope="module")
def bands() -> np.ndarray:
    """uint8 (24, 32, 7)."""
    return np.random.default_rng(0).integers(0, 256, (24, 32, 7), dtype=np.uint8)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize(
    ("count", "dtype"),
    [(3, "u1"), (4, "u1"), (5, "u1"), (6, "u1"), (3, "<u2"), (4, "<u2"), (3, ">u2"), (4, ">u2")],
)
def test_of_bands_without_colours_the_first_three_are_red_green_and_blue(
    bands: np.ndarray, count: int, dtype: str, deflate: bool
) -> None:
    scale = 257 if dtype.endswith("2") else 1
    stored = (bands[..., :count].astype(int) * scale).astype(dtype)
    for big in [False] if dtype == ">u2" else [False, True]:
        data = write_tiff(stored, extra=[0] * (count - 1), deflate=deflate, big=big)
        assert np.array_equal(decode_image(data), bands[..., :3])


def test_three_bands_without_the_tag_of_extra_ones_are_colours(bands: np.ndarray) -> None:
    assert np.array_equal(decode_image(write_tiff(bands[..., :3])), bands[..., :3])


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("photometric", [1, 2])
@pytest.mark.parametrize("count", [3, 4, 7])
@pytest.mark.parametrize("dtype", ["u1", "<u2"])
def test_bands_in_separate_planes_are_put_together(
    bands: np.ndarray, dtype: str, count: int, photometric: int, deflate: bool
) -> None:
    # Pillow alone reads RGB of 16 bits in planes wrongly, without an error.
    scale = 257 if dtype == "<u2" else 1
    stored = (bands[..., :count].astype(int) * scale).astype(dtype)
    extra = [0] * (count - (1 if photometric == 1 else 3))
    data = write_tiff(stored, photometric=photometric, extra=extra, planes=True, deflate=deflate)
    assert np.array_equal(decode_image(data), bands[..., :3])


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("deflate", [False, True])
def test_the_orientation_of_bands_is_applied_once(bands: np.ndarray, planes: bool, deflate: bool) -> None:
    data = write_tiff(bands[..., :3], planes=planes, deflate=deflate, tags={274: 6})
    assert np.array_equal(decode_image(data), np.rot90(bands[..., :3], -1))


@pytest.mark.parametrize(
    ("data", "layout"),
    [
        ({"dtype": "i2", "count": 1}, "TIFF of 1 band, 16-bit signed, BlackIsZero: has no known white level"),
        ({"dtype": "u4", "count": 1}, "TIFF of 1 band, 32-bit, BlackIsZero: has no known white level"),
        ({"dtype": "f4", "count": 1}, "TIFF of 1 band, 32-bit float, BlackIsZero: has no known white level"),
        (
            {"dtype": "f8", "count": 1},
            "TIFF of 1 band, 64-bit float, BlackIsZero: a layout that can't be read",
        ),
        # Pillow alone takes signed bytes for unsigned ones.
        ({"dtype": "i1", "count": 1}, "TIFF of 1 band, 8-bit signed, BlackIsZero: a layout"),
        ({"dtype": "u2", "count": 2, "extra": [0]}, "TIFF of 2 bands, 16-bit, BlackIsZero: a layout"),
        ({"dtype": "i2", "count": 3}, "TIFF of 3 bands, 16-bit signed, BlackIsZero: a layout"),
        ({"dtype": "f4", "count": 3, "photometric": 2}, "TIFF of 3 bands, 32-bit float, RGB: a layout"),
        ({"dtype": "u2", "count": 5, "extra": [0] * 4}, "TIFF of 5 bands, 16-bit, BlackIsZero: a layout"),
        ({"dtype": "u1", "count": 7, "extra": [0] * 6}, "TIFF of 7 bands, 8-bit, BlackIsZero: a layout"),
        (
            {"dtype": "u2", "count": 1, "photometric": 32803},
            "TIFF of 1 band, 16-bit, colour filter array: a layout",
        ),
        (
            {"dtype": "u1", "count": 3, "tags": {259: 34712}},
            "3 bands, 8-bit, BlackIsZero, compression 34712: a layout",
        ),
    ],
)
def test_other_layouts_are_called_what_they_are(
    bands: np.ndarray, capfd: pytest.CaptureFixture[str], data: dict, layout: str
) -> None:
    dtype, count = data.pop("dtype"), data.pop("count")
    content = write_tiff(bands[..., :count].astype(dtype), **data)
    with pytest.raises(ImageError) as caught:
        decode_image(content)
    assert layout in str(caught.value)
    assert "damaged" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_big_endian_bigtiff_which_pillow_can_not_read_is_called_that(bands: np.ndarray) -> None:
    with pytest.raises(ImageError, match="BigTIFF in big-endian order can't be read here"):
        decode_image(write_tiff(bands.astype(">u2"), big=True))


def test_cut_bands_are_damaged_and_too_large_ones_too_large(
    bands: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    for planes in (False, True):
        data = write_tiff(bands[..., :3], planes=planes)
        for cut in (1, 500, len(data) - 40):
            with pytest.raises(ImageError, match="damaged or truncated TIFF"):
                decode_image(data[:-cut])
    monkeypatch.setattr(image_decode, "MAX_PIXELS", 24 * 32 - 1)
    for planes in (False, True):
        with pytest.raises(ImageError, match="too large: 32 x 24"):
            decode_image(write_tiff(bands[..., :3], planes=planes))
