from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mobilesam.sam import MAX_PIXELS, ImageError, decode_image, load_image
from mobilesam.sam.photos import image_decode

Encode = Callable[..., bytes]
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"]


def reason(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    message = str(caught.value)
    assert "\n" not in message
    assert "BytesIO" not in message
    return message


def test_an_empty_image_file_is_reported_as_empty() -> None:
    assert reason(b"") == "the file is empty (0 bytes)"


@pytest.mark.parametrize(
    "data", [b"hello, I am text", b"{}", b"\xff\xd8", b"RIFF\x10\0\0\0WAVEfmt ", bytes(100)]
)
def test_what_is_no_image_says_what_it_begins_with(data: bytes) -> None:
    message = reason(data)
    assert message.startswith("not a JPEG, PNG, WebP, BMP, TIFF or GIF image")
    assert repr(data[:8]) in message
    assert f"{len(data)} bytes" in message


def test_text_that_begins_like_a_bitmap_is_still_refused() -> None:
    assert reason(b"BMW is a maker of cars, and this is a text about it.").startswith(
        "damaged or truncated BMP"
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
def test_a_file_cut_short_is_an_error_and_never_a_half_grey_picture(
    photos: dict[str, bytes], encode: Encode, format: str, share: float
) -> None:
    data = encode(decode_image(photos["cat.png"]), format)
    assert reason(data[: int(len(data) * share)]).startswith(("damaged or truncated", "not a JPEG"))


def test_a_progressive_jpeg_cut_between_its_scans_is_an_error(
    photos: dict[str, bytes], encode: Encode
) -> None:
    data = encode(decode_image(photos["cat.png"]), "JPEG", progressive=True)
    last_scan = data.rindex(b"\xff\xda")
    assert reason(data[:last_scan]).startswith("damaged or truncated JPEG")


@pytest.mark.parametrize("format", FORMATS)
def test_any_cut_gives_an_error_or_all_the_pixels(scene: np.ndarray, encode: Encode, format: str) -> None:
    data = encode(scene, format)
    whole = decode_image(data)
    for end in range(0, len(data), 1 if len(data) < 2000 else 37):
        try:
            cut = decode_image(data[:end])
        except ImageError:
            continue
        assert np.array_equal(cut, whole), end


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_damage_gives_an_image_error_or_an_image(
    scene: np.ndarray, encode: Encode, format: str, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(encode(scene, format))
    for position, value in flips:
        data[position % len(data)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            decoded = load_image(bytes(data), 64).pixels_HWC
        except ImageError:
            return
    assert decoded.dtype == np.uint8
    assert decoded.shape[2] == 3
    assert max(decoded.shape) == 64


def png_header(width: int, height: int, idat: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", idat) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_from_its_header_without_decoding() -> None:
    bomb = png_header(60_000, 60_000, zlib.compress(bytes(10_000_000)))
    tracemalloc.start()
    message = reason(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message == "too large: 60000 x 60000 is 3,600,000,000 pixels, the limit is 200,000,000"
    assert peak < 5_000_000


def test_the_limit_is_ours_alone_and_not_pillows_global_one(
    scene: np.ndarray, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert np.array_equal(decode_image(encode(scene, "PNG")), scene)
    monkeypatch.setattr("mobilesam.sam.photos.image_decode.MAX_PIXELS", scene.shape[0] * scene.shape[1])
    assert np.array_equal(decode_image(encode(scene, "PNG")), scene)
    monkeypatch.setattr("mobilesam.sam.photos.image_decode.MAX_PIXELS", scene.shape[0] * scene.shape[1] - 1)
    assert reason(encode(scene, "PNG")) == "too large: 60 x 40 is 2,400 pixels, the limit is 2,399"


def test_a_phone_photo_of_200_megapixels_is_within_the_limit() -> None:
    assert MAX_PIXELS >= 16320 * 12240


def test_memory_that_runs_out_fails_the_image_with_its_size(
    scene: np.ndarray, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", exhausted)
    assert reason(encode(scene, "PNG")) == "out of memory while decoding 60 x 40 pixels"


TEXT = "x" * (2 << 20)


def texts(*added: tuple[str, bool]) -> PngInfo:
    info = PngInfo()
    for kind, packed in added:
        (info.add_itxt if kind == "iTXt" else info.add_text)("prompt", TEXT, zip=packed)
    return info


@pytest.mark.parametrize(
    "options",
    [
        {"pnginfo": texts(("zTXt", True))},
        {"pnginfo": texts(("iTXt", True))},
        {"pnginfo": texts(("iTXt", False))},
        {"pnginfo": texts(*[("zTXt", True)] * 40)},
        {"icc_profile": bytes(2 << 20)},
    ],
)
def test_a_png_with_any_amount_of_metadata_has_the_pixels_of_one_without(
    scene: np.ndarray, encode: Encode, options: dict
) -> None:
    data = encode(scene, "PNG", **options)
    assert np.array_equal(decode_image(data), scene)
    tracemalloc.start()
    decode_image(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20


def test_large_texts_behind_the_pixels_and_an_orientation_beside_them_change_nothing(
    scene: np.ndarray, encode: Encode
) -> None:
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    info = texts(("zTXt", True))
    info.add_itxt("XML:com.adobe.xmp", xmp)
    data = encode(scene, "PNG", pnginfo=info)
    assert np.array_equal(decode_image(data), np.rot90(scene, -1))
    start = data.index(b"zTXt") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    last = data.index(b"IEND") - 4
    moved = data[:start] + data[end:last] + data[start:end] + data[last:]
    assert np.array_equal(decode_image(moved), np.rot90(scene, -1))


def test_damaged_pixels_beside_large_texts_are_still_an_error(scene: np.ndarray, encode: Encode) -> None:
    data = bytearray(encode(scene, "PNG", pnginfo=texts(("zTXt", True))))
    data[data.index(b"IDAT") + 30] ^= 0xFF
    assert reason(bytes(data)).startswith("damaged or truncated PNG")
    assert reason(bytes(data[:-60])).startswith("damaged or truncated PNG")


def test_damaged_metadata_of_a_png_is_left_out_and_no_pixels_are(scene: np.ndarray, encode: Encode) -> None:
    data = bytearray(encode(scene, "PNG", pnginfo=texts(("zTXt", True)), dpi=(72, 72), exif=b"Exif\0\0II*\0"))
    for kind in (b"zTXt", b"pHYs", b"eXIf"):
        data[data.index(kind) + 6] ^= 0xFF
    assert np.array_equal(decode_image(bytes(data)), scene)
    data[data.index(b"IHDR") + 7] ^= 1
    assert reason(bytes(data)) == "damaged or truncated PNG: broken PNG file (bad header checksum in b'IHDR')"


@pytest.mark.parametrize(
    ("marker", "bits", "wanted"),
    [
        (0xC1, 12, "with 12 bits a sample"),
        (0xC3, 8, "that is lossless"),
        (0xC5, 8, "of several sizes in one (hierarchical)"),
        (0xF7, 8, "of the kind JPEG-LS"),
    ],
)
def test_jpegs_that_no_decoder_here_knows_are_called_what_they_are(
    scene: np.ndarray, encode: Encode, marker: int, bits: int, wanted: str
) -> None:
    data = bytearray(encode(scene, "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = marker, bits
    assert reason(bytes(data)) == f"a JPEG {wanted}, which can't be decoded here: save it with 8 bits, lossy"


@pytest.mark.parametrize("options", [{}, {"subsampling": 0, "quality": 95}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("picture", ["noise", "smooth", "flat", "half"])
def test_a_jpeg_that_lacks_only_its_end_mark_is_whole_and_one_byte_less_is_not(
    scene: np.ndarray, encode: Encode, picture: str, options: dict
) -> None:
    pictures = {
        "noise": np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8),
        "smooth": scene,
        "flat": np.full((48, 64, 3), 90, np.uint8),
        "half": np.concatenate([scene, np.full_like(scene, 255)]),
    }
    data = encode(pictures[picture], "JPEG", **options)
    whole = decode_image(data)
    assert np.array_equal(decode_image(data[:-1]), whole)
    assert np.array_equal(decode_image(data[:-2]), whole)
    for cut in range(3, 200):
        assert reason(data[:-cut]).startswith("damaged or truncated JPEG"), cut


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_and_avif_photos_are_decoded_whatever_their_names(
    scene: np.ndarray, encode: Encode, orientation: int
) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = np.rot90(scene, -1) if orientation == 6 else scene
    assert np.abs(decode_image(encode(scene, "AVIF", exif=exif)).astype(int) - turned).mean() < 3
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(scene)).save(buffer, quality=95)
    heic = buffer.getvalue()
    assert np.abs(decode_image(heic).astype(int) - scene).mean() < 3
    for share in (0.1, 0.5, 0.95):
        assert reason(heic[: int(len(heic) * share)]).startswith(("damaged or truncated HEIF", "not a JPEG"))


def test_without_pillow_heif_a_heic_photo_is_called_that_with_the_mend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image_decode, "decodable", lambda kind: False)
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
    assert (
        reason(data)
        == "the file is an image in HEIC, which can't be decoded here: pip install 'mobilesam[heif]'"
    )
    assert "an image in AVIF, which can't be decoded here: install a Pillow" in reason(
        data.replace(b"heic", b"avif")
    )


def test_files_of_other_kinds_are_called_what_they_are() -> None:
    assert " but ZIP archive: " in reason(b"PK\x03\x04" + bytes(40))
    assert " but video: " in reason(b"\0\0\0\x18ftypmp42" + bytes(40))
    assert " but HTML: " in reason(b"<!DOCTYPE html><title>Not found</title>")
