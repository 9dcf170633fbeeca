from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from mobilesam.sam import ImageError, decode_image, load_image

Encode = Callable[..., bytes]


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def rgb(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_back_the_pixels(scene: np.ndarray, encode: Encode, format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode_image(encode(scene, format, **options))
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, scene)


def test_a_jpeg_decodes_as_pillow_decodes_it(photos: dict[str, bytes]) -> None:
    data = photos["raccoon.jpg"]
    assert np.array_equal(decode_image(data), rgb(Image.open(io.BytesIO(data))))


def test_memoryviews_and_bytearrays_decode_like_bytes(scene: np.ndarray, encode: Encode) -> None:
    data = encode(scene, "PNG")
    assert np.array_equal(decode_image(bytearray(data)), scene)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(
    scene: np.ndarray, encode: Encode, format: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(scene, format, exif=exif)
    # Two references: Pillow's own transposition, and NumPy's turns of the untagged picture.
    assert np.array_equal(decode_image(data), rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
    plain = decode_image(encode(scene, format))
    turned = {
        1: plain,
        2: plain[:, ::-1],
        3: plain[::-1, ::-1],
        4: plain[::-1],
        5: plain.swapaxes(0, 1),
        6: np.rot90(plain, -1),
        7: plain[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(plain),
    }
    assert np.array_equal(decode_image(data), turned[orientation])
    assert load_image(data, 64).original_size == turned[orientation].shape[:2]


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_a_nonsensical_orientation_counts_as_none(scene: np.ndarray, encode: Encode, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert np.array_equal(decode_image(encode(scene, "PNG", exif=exif)), scene)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x40\0"]
)
def test_damaged_exif_does_not_cost_the_image(scene: np.ndarray, encode: Encode, exif: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(decode_image(encode(scene, "PNG", exif=exif)), scene)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_dropped_and_colours_stay_as_stored(scene: np.ndarray, encode: Encode, format: str) -> None:
    alpha = np.tile(np.arange(60, dtype=np.uint8) * 4, (40, 1))  # transparent on the left
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    assert np.array_equal(decode_image(encode(np.dstack([scene, alpha]), format, **options)), scene)


def test_grey_with_alpha_drops_the_alpha(scene: np.ndarray, encode: Encode) -> None:
    grey = scene[..., 0]
    decoded = decode_image(encode(np.dstack([grey, np.zeros_like(grey)]), "PNG"))
    assert np.array_equal(decoded, np.dstack([grey] * 3))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "GIF"])
def test_grey_is_repeated_over_three_channels(scene: np.ndarray, encode: Encode, format: str) -> None:
    decoded = decode_image(encode(scene[..., 0], format))
    assert (decoded[..., 0] == decoded[..., 1]).all()
    assert (decoded[..., 0] == decoded[..., 2]).all()
    assert np.abs(decoded[..., 0].astype(int) - scene[..., 0]).max() <= (4 if format == "JPEG" else 0)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF"])
def test_one_bit_becomes_black_and_white(encode: Encode, format: str) -> None:
    bits = np.eye(16, dtype=bool)
    assert np.array_equal(decode_image(encode(bits, format)), np.dstack([bits * np.uint8(255)] * 3))


@pytest.mark.parametrize("transparency", [None, 3, bytes([0, 128, 255])], ids=["opaque", "index", "alphas"])
def test_a_palette_gives_its_colours_even_where_transparent(
    encode: Encode, transparency: int | bytes | None
) -> None:
    palette = [10, 20, 30, 200, 100, 50, 0, 0, 255, 255, 255, 0]
    indexes = np.tile(np.arange(4, dtype=np.uint8), (5, 3))
    picture = Image.fromarray(indexes, mode="L")
    picture.putpalette(palette)
    options = {} if transparency is None else {"transparency": transparency}
    expected = np.array(palette, np.uint8).reshape(4, 3)[indexes]
    assert np.array_equal(decode_image(encode(picture, "PNG", **options)), expected)
    if not isinstance(transparency, bytes):
        assert np.array_equal(decode_image(encode(picture, "GIF", **options)), expected)


def test_one_transparent_colour_is_kept_as_that_colour(scene: np.ndarray, encode: Encode) -> None:
    data = encode(scene, "PNG", transparency=tuple(int(c) for c in scene[0, 0]))
    assert np.array_equal(decode_image(data), scene)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_scaled_and_not_clipped(encode: Encode, format: str) -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.round(levels / 257).astype(np.uint8)
    assert expected.min() == 0
    assert expected.max() == 255
    assert np.array_equal(decode_image(encode(levels, format)), np.dstack([expected] * 3))


def test_big_endian_grey_of_16_bits_is_scaled_alike(encode: Encode) -> None:
    levels = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    picture = Image.frombytes("I;16B", (64, 64), levels.astype(">u2").tobytes())
    data = encode(picture, "TIFF")
    assert data.startswith(b"MM")
    assert np.array_equal(decode_image(data)[..., 0], np.round(levels / 257))


def tiff(bits: int, photometric: int, strip: bytes, width: int, height: int) -> bytes:
    """A TIFF of one uncompressed grey strip, written by the book: Pillow can't write these."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric)]
    tags += [(273, 8), (277, 1), (278, height), (279, len(strip))]
    directory = len(tags).to_bytes(2, "little")
    for tag, value in tags:
        directory += tag.to_bytes(2, "little") + (4).to_bytes(2, "little")
        directory += (1).to_bytes(4, "little") + value.to_bytes(4, "little")
    return b"II*\0" + (8 + len(strip)).to_bytes(4, "little") + strip + directory + bytes(4)


def test_a_tiff_whose_white_is_zero_is_not_taken_for_its_negative() -> None:
    levels = np.linspace(0, 65535, 12).astype("<u2")
    expected = 255 - np.round(levels / 257).reshape(3, 4)
    assert np.array_equal(decode_image(tiff(16, 0, levels.tobytes(), 4, 3))[..., 0], expected)
    assert np.array_equal(decode_image(tiff(16, 1, levels.tobytes(), 4, 3))[..., 0], 255 - expected)
    assert np.array_equal(decode_image(tiff(8, 0, bytes([0, 100, 255]), 3, 1))[0, :, 0], [255, 155, 0])


def test_grey_of_12_bits_is_scaled_by_its_own_range() -> None:
    # Two pixels a triple of bytes: 0xFFF, 0x000 and 0x800, 0x123.
    decoded = decode_image(tiff(12, 1, bytes([0xFF, 0xF0, 0x00, 0x80, 0x01, 0x23]), 4, 1))
    assert np.array_equal(decoded[0, :, 0], np.round(np.array([0xFFF, 0, 0x800, 0x123]) * 255 / 4095))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_white_level_are_refused_with_the_mend(encode: Encode, dtype: type) -> None:
    with pytest.raises(ImageError, match="no known white level: convert it to 8 or 16 bits, unsigned"):
        decode_image(encode(np.ones((4, 4), dtype), "TIFF"))


def test_a_colour_mode_without_a_policy_is_refused(encode: Encode) -> None:
    with pytest.raises(ImageError, match="TIFF with colour mode LAB is not supported: convert it to RGB"):
        decode_image(encode(Image.new("LAB", (4, 4)), "TIFF"))


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_gives_the_colours_that_the_inks_print(encode: Encode, format: str) -> None:
    inks = {"white": (0, 0, 0, 0), "red": (0, 255, 255, 0), "cyan": (255, 0, 0, 0), "black": (0, 0, 0, 255)}
    colours = {"white": (255, 255, 255), "red": (255, 0, 0), "cyan": (0, 255, 255), "black": (0, 0, 0)}
    options = {"quality": 100} if format == "JPEG" else {}
    for name, ink in inks.items():
        data = encode(Image.new("CMYK", (16, 16), ink), format, **options)
        error = np.abs(decode_image(data).astype(int) - colours[name])
        assert error.max() <= 2, name


def test_a_ycck_jpeg_of_adobe_gives_its_colours(encode: Encode) -> None:
    # No library here writes YCCK: four stored components become one when Adobe's marker calls the first three YCbCr.
    # YCbCr there codes 255 - stored ink, and Adobe stores 255 - ink: what is coded is the ink, 255 - colour.
    for colour in [(255, 0, 0), (20, 200, 90), (255, 255, 255)]:
        ycc = Image.new("RGB", (16, 16), tuple(255 - level for level in colour)).convert("YCbCr").split()
        no_black = Image.new("L", (16, 16), 255)
        # Pillow inverts what it writes into a CMYK JPEG.
        written = [Image.eval(band, lambda level: 255 - level) for band in (*ycc, no_black)]
        data = encode(Image.merge("CMYK", written), "JPEG", quality=100)
        marker = data.index(b"Adobe")
        assert data[marker + 11] == 0
        data = data[: marker + 11] + b"\x02" + data[marker + 12 :]
        assert np.abs(decode_image(data).astype(int) - colour).max() <= 3


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken(encode: Encode, format: str) -> None:
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert np.array_equal(decode_image(data), rgb(frames[0]))


def test_colour_profiles_are_left_unapplied(scene: np.ndarray, encode: Encode) -> None:
    assert np.array_equal(decode_image(encode(scene, "PNG", icc_profile=b"a profile" * 20)), scene)


def test_the_content_decides_the_format_whatever_stands_in_the_metadata(
    scene: np.ndarray, encode: Encode
) -> None:
    text = PngInfo()
    text.add_text("Comment", "GIF89a BM II*")
    assert np.array_equal(decode_image(encode(scene, "PNG", pnginfo=text)), scene)
