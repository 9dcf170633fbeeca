"""Image decoding: bytes of a file to RGB pixels, with a defined policy for every kind of image in photo folders."""

from __future__ import annotations

import io
import logging
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COMPRESSION,
    COMPRESSION_INFO,
    EXTRASAMPLES,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
    STRIPBYTECOUNTS,
    STRIPOFFSETS,
    TILEBYTECOUNTS,
    TILEOFFSETS,
    ImageFileDirectory_v2,
    TiffImageFile,
)
from PIL.WebPImagePlugin import WebPImageFile

from ...common.errors import ImageError, counted
from .file_kinds import HEAD_BYTES, INSTALL_HEIF, content_kind, decodable

logger = logging.getLogger(__name__)

# Of damaged metadata, mostly: it is ignored, and a warning doesn't say in which file it is.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

MAX_PIXELS = 200_000_000
"""Largest image that is decoded, in pixels: enough for 200-megapixel cameras (800 MB while decoding)."""

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"

_MAGIC: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (_JPEG, JpegImageFile),
    (_PNG, PngImageFile),
    (b"RIFF", WebPImageFile),
    (b"GIF8", GifImageFile),
    (b"BM", BmpImageFile),
    *((magic, TiffImageFile) for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that brings the stored image into upright orientation, by EXIF orientation."""


def decode_image(data: bytes) -> np.ndarray:
    """Decode an image file.

    The format (JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF, or HEIC if pillow-heif is installed) is recognised by the
    content, never by the name. Policies:
    - EXIF orientation is applied; an unreadable or invalid one is ignored.
    - Alpha (RGBA, LA, in a palette or as one transparent colour) is dropped without blending, as by
      `Image.convert("RGB")` and OpenCV.
    - Grey and 1-bit images are repeated over the three channels. 16-bit grey is scaled by its full range (65535
      becomes 255, rounded), not clipped; Pillow reduces 16-bit colour to the high bytes. 32-bit and float pixels
      have no defined white level and are refused.
    - CMYK and YCCK, including Adobe's inverted variants, are converted by Pillow's simple formula.
    - ICC profiles and gamma are not applied, as in SAM's own code.
    - Of several frames or pages the first one is used.
    - Of a TIFF whose bands have no stated colour, as satellites' have, the first three are red, green and blue.
    - Metadata is not pixels: a PNG is decoded whatever the size of its texts and profile, and if these are damaged.
      So is a JPEG that lacks only its end mark; one whose pixels are cut is refused.

    Args:
        data: the file's bytes.

    Returns:
        uint8 RGB (H, W, 3), read-only.

    Raises:
        ImageError: the file is empty, truncated, damaged or no image, has more than MAX_PIXELS pixels by its header,
            or a colour mode without a policy. The message is a one-line reason.
    """
    return np.asarray(decode_rgb(data))


def decode_rgb(data: bytes) -> Image.Image:
    """Decode as `decode_image` does, but into a Pillow image in mode RGB, which can be resized without a copy."""
    try:
        return _decode(data)
    except ImageError as error:
        if data.startswith(_PNG) and _is_of_metadata(str(error.__cause__)):
            return _decode(b"".join(_chunks_without_texts(data)))
        if data.startswith(_JPEG) and "image file is truncated" in str(error.__cause__):
            rgb = _decode_without_end(data)
            if rgb is not None:
                return rgb
        unknown = _unknown_frame(data)
        if unknown is not None:
            raise ImageError(
                f"a JPEG {unknown}, which can't be decoded here: save it with 8 bits, lossy"
            ) from error
        raise


def _decode(data: bytes) -> Image.Image:
    image = _open(data)
    width, height = image.size
    _refuse_large(width, height)
    try:
        image.load()
        rgb = _to_rgb(image)
        turn = _TURNS.get(_orientation(image))
        return rgb if turn is None else rgb.transpose(turn)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"out of memory while decoding {width} x {height} pixels") from error
    except Exception as error:  # decoders raise anything for damaged bytes
        raise ImageError(_reason(image, error)) from error


def _refuse_large(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"too large: {width} x {height} is {width * height:,} pixels, the limit is {MAX_PIXELS:,}"
        )


def exif_orientation(data: bytes) -> int:
    """Return the EXIF orientation of an image file, 1 to 8: 5 to 8 exchange width and height. 1 if it states none.

    Args:
        data: the file's bytes.

    Raises:
        ImageError: it is no image file.
    """
    return _orientation(_open(data))


def _open(data: bytes) -> Image.Image:
    """Read the header with Pillow's class of the format: `Image.open` has a global pixel limit of its own."""
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    opener = _opener(data)
    try:
        return _open_tiff(io.BytesIO(data)) if opener is TiffImageFile else opener(io.BytesIO(data))
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"out of memory while opening an image of {len(data):,} bytes") from error
    except Exception as error:  # parsers raise anything for damaged bytes
        raise ImageError(_reason(opener, error)) from error


def _opener(data: bytes) -> Callable[[io.BytesIO], ImageFile.ImageFile]:
    for magic, opener in _MAGIC:
        if data.startswith(magic) and (opener is not WebPImageFile or data[8:12] == b"WEBP"):
            return opener
    kind = content_kind(data[:HEAD_BYTES])
    if kind in ("HEIC", "AVIF") and not decodable(kind):
        mend = INSTALL_HEIF if kind == "HEIC" else "install a Pillow that is built with AVIF"
        raise ImageError(f"the file is an image in {kind}, which can't be decoded here: {mend}")
    if kind == "AVIF":
        return AvifImageFile
    if kind == "HEIC":
        from pillow_heif import HeifImageFile

        return HeifImageFile
    what = "" if kind is None else f" but {kind}"
    raise ImageError(
        f"not a JPEG, PNG, WebP, BMP, TIFF or GIF image{what}: {len(data):,} bytes, the first are "
        f"{bytes(data[:8])!r}"
    )


def _reason(image: object, error: Exception) -> str:
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"damaged or truncated {getattr(image, 'format', 'image')}: {detail}"


_FRAMES = {
    0xC3: "that is lossless",
    0xC5: "of several sizes in one (hierarchical)",
    0xC6: "of several sizes in one (hierarchical)",
    0xC7: "of several sizes in one (hierarchical)",
    0xCB: "that is lossless",
    0xF7: "of the kind JPEG-LS",
}
"""Markers of a JPEG's frame header that no decoder here knows, in words."""


def _unknown_frame(data: bytes) -> str | None:
    """Return why a JPEG's frame can't be decoded, in words; None if its header is an ordinary one or isn't found."""
    at = 2
    while data.startswith(_JPEG) and data[at : at + 1] == b"\xff" and at + 5 <= len(data):
        marker = data[at + 1]
        if marker in _FRAMES:
            return _FRAMES[marker]
        if marker in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA):
            return None if data[at + 4] == 8 else f"with {data[at + 4]} bits a sample"
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _is_of_metadata(reason: str) -> bool:
    """Return True if Pillow refused a PNG for a text that is too large, or for the checksum of a chunk that decoders
    may ignore: their names begin with a small letter."""
    broken = re.search(r"checksum in b'([a-z])", reason)
    return "MAX_TEXT" in reason or broken is not None


_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ORIENTING = (b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Keywords of texts from which Pillow reads the EXIF orientation."""
_MAX_TEXT = 1 << 20
"""Bytes that a text may have when it is decompressed; Pillow's own limit."""


def _chunks_without_texts(data: bytes) -> Iterator[bytes]:
    """Yield the parts of a PNG without its texts and its profile, but for those that can state an orientation, and
    without damaged metadata.

    Pillow refuses a picture with very large ones, and its limits are the same for all threads.
    """
    yield _PNG
    at = len(_PNG)
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        content = data[at + 8 : at + 8 + size]
        is_whole = zlib.crc32(kind + content) == int.from_bytes(data[at + 8 + size : at + 12 + size], "big")
        is_orienting = content.split(b"\0", 1)[0] in _ORIENTING and _is_small_text(kind, content)
        if (is_whole or kind[:1].isupper()) and (kind not in _TEXTS or is_orienting):
            yield data[at : at + 12 + size]
        at += 12 + size


def _is_small_text(kind: bytes, content: bytes) -> bool:
    packed = content.split(b"\0", 1)[1] if kind == b"zTXt" else content.split(b"\0", 1)[-1]
    if kind == b"zTXt":
        packed = packed[1:]  # behind the method of compression
    elif kind == b"iTXt" and packed[:1] == b"\1":
        packed = packed[2:].split(b"\0", 2)[-1]  # behind the language and the translated keyword
    else:
        return len(content) <= _MAX_TEXT
    try:
        return len(zlib.decompressobj().decompress(packed, _MAX_TEXT + 1)) <= _MAX_TEXT
    except zlib.error:
        return False


_FILLERS = (b"\0" * 64, b"\x55" * 64, b"\xaa" * 64)


def _decode_without_end(data: bytes) -> Image.Image | None:
    """Decode a JPEG that has all its pixels, but not the mark behind them; return None if pixels are missing.

    The decoder reads a few bytes ahead of what it decodes, so it is given some. Where pixels depend on these, the
    bytes of the pixels themselves are missing; where more bytes are missing, the decoder asks for them in vain. A
    progressive JPEG can't be told from one that lacks whole scans, and is not decoded.
    """
    body = data.removesuffix(b"\xff")  # the first half of the mark
    try:
        decoded = [_decode(body + filler) for filler in _FILLERS]
    except ImageError:
        return None
    first = decoded[0].tobytes()
    return decoded[0] if all(other.tobytes() == first for other in decoded[1:]) else None


_MOST_BANDS = 6
"""Most bands of a TIFF that Pillow reads."""

_TIFF_BYTES = {1: 1, 3: 2, 4: 4, 13: 4, 16: 8}
"""Bytes of a tag's value, by its type: BYTE, SHORT, LONG, IFD, LONG8."""

_PHOTOMETRIC = {
    0: "WhiteIsZero",
    1: "BlackIsZero",
    2: "RGB",
    3: "palette",
    4: "mask",
    5: "CMYK",
    6: "YCbCr",
    8: "CIELab",
    32803: "colour filter array",
    34892: "linear RAW",
}
_SAMPLE_FORMATS = {1: "", 2: " signed", 3: " float", 5: " complex integer", 6: " complex float"}


def _open_tiff(stream: io.BytesIO) -> Image.Image:
    """Open a TIFF by its tags; its bands are read as RGB if they have no stated colour, or lie in separate planes.

    Raises:
        ImageError: its layout can't be read; the message describes it.
    """
    data = stream.getvalue()
    if data.startswith(b"MM\0+"):
        raise ImageError("BigTIFF in big-endian order can't be read here; convert it to little-endian")
    tags = _tiff_tags(data)
    bands, bits = tags.get(SAMPLESPERPIXEL, 1), tags.get(BITSPERSAMPLE, (1,))
    known = tags.get(COMPRESSION, 1) in COMPRESSION_INFO
    unsigned = set(tags.get(SAMPLEFORMAT, (1,))) == {1} and set(bits) <= {8, 16}
    if tags.get(PHOTOMETRIC_INTERPRETATION) in (1, 2) and bands >= 3 and known and unsigned:
        if tags.get(PLANAR_CONFIGURATION, 1) == 2:
            return _first_planes(data, tags, bands)
        if tags.get(PHOTOMETRIC_INTERPRETATION) == 1 and bands <= _MOST_BANDS:
            stream = io.BytesIO(_edited(data, tags, _rgb_tags(bands)))
    signed_bytes = 2 in tags.get(SAMPLEFORMAT, (1,)) and 8 in bits  # Pillow takes them for unsigned ones
    if bands <= _MOST_BANDS and known and not signed_bytes:
        with suppress(SyntaxError):  # Pillow's word for a layout that it doesn't know
            return TiffImageFile(stream)
    raise ImageError(f"{_layout(tags)}: a layout that can't be read here; convert it to RGB with 8 bits")


def _tiff_tags(data: bytes) -> ImageFileDirectory_v2:
    """Read the first directory of a TIFF."""
    stream = io.BytesIO(data)
    header = stream.read(8)
    if header[2:3] == b"\x2b" or header[3:4] == b"\x2b":  # BigTIFF
        header += stream.read(8)
    tags = ImageFileDirectory_v2(header)
    stream.seek(tags.next)
    tags.load(stream)
    if not (tags.get(IMAGEWIDTH) and tags.get(IMAGELENGTH) and (STRIPOFFSETS in tags or TILEOFFSETS in tags)):
        raise ValueError("its first directory states no size or no place of the pixels")
    return tags


def _layout(tags: ImageFileDirectory_v2) -> str:
    """Return a TIFF's layout in words: `TIFF of 3 bands, 16-bit, BlackIsZero`."""
    bits = tags.get(BITSPERSAMPLE, (1,))
    formats = set(tags.get(SAMPLEFORMAT, (1,)))
    each = f"{bits[0]}" if len(set(bits)) == 1 else "/".join(map(str, bits))
    kind = (
        _SAMPLE_FORMATS.get(next(iter(formats)), " unknown") if len(formats) == 1 else " of several formats"
    )
    colour = tags.get(PHOTOMETRIC_INTERPRETATION)
    words = [f"TIFF of {counted(tags.get(SAMPLESPERPIXEL, 1), 'band')}", f"{each}-bit{kind}"]
    words.append(
        "no colour stated" if colour is None else _PHOTOMETRIC.get(colour, f"colours of kind {colour}")
    )
    if tags.get(PLANAR_CONFIGURATION, 1) == 2:
        words.append("in separate planes")
    compression = tags.get(COMPRESSION, 1)
    if compression != 1:
        words.append(f"compression {COMPRESSION_INFO.get(compression, compression)}")
    return ", ".join(words)


def _rgb_tags(bands: int) -> dict[int, list[int] | None]:
    """Return the tags by which the first three of a TIFF's bands are red, green and blue, and the others nothing."""
    return {PHOTOMETRIC_INTERPRETATION: [2], EXTRASAMPLES: [0] * (bands - 3) or None}


def _first_planes(data: bytes, tags: ImageFileDirectory_v2, bands: int) -> Image.Image:
    """Decode the first three planes of a TIFF whose bands lie in separate planes, each as a grey image."""
    single = {SAMPLESPERPIXEL: [1], PHOTOMETRIC_INTERPRETATION: [1], PLANAR_CONFIGURATION: [1]}
    _refuse_large(tags[IMAGEWIDTH], tags[IMAGELENGTH])
    planes, orientation = [], 1
    for plane in range(3):
        changed: dict[int, list[int] | None] = {**single, EXTRASAMPLES: None}
        changed |= {tag: list(tags[tag][:1]) for tag in (BITSPERSAMPLE, SAMPLEFORMAT) if tag in tags}
        for tag in (STRIPOFFSETS, STRIPBYTECOUNTS, TILEOFFSETS, TILEBYTECOUNTS):
            if tag in tags:
                parts = len(tags[tag]) // bands
                changed[tag] = list(tags[tag][plane * parts : (plane + 1) * parts])
        image = TiffImageFile(io.BytesIO(_edited(data, tags, changed)))
        image.load()
        orientation = _orientation(image)  # 1 where Pillow has turned the image itself
        # As Pillow does where colours of 16 bits are not in planes.
        planes.append(
            image if image.mode == "L" else Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        )
    merged = Image.merge("RGB", planes)
    merged.getexif()[ExifTags.Base.Orientation] = orientation
    return merged


def _edited(data: bytes, tags: ImageFileDirectory_v2, changed: Mapping[int, list[int] | None]) -> bytes:
    """Return a TIFF with other values of some of its first directory's tags; a tag changed to None is hidden."""
    order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"
    count_bytes, entry_bytes, inline = (8, 20, 8) if data[2] == 43 else (2, 12, 4)
    edited = bytearray(data)
    start = tags.offset
    for index in range(int.from_bytes(data[start : start + count_bytes], order)):
        at = start + count_bytes + index * entry_bytes
        tag = int.from_bytes(data[at : at + 2], order)
        if tag not in changed:
            continue
        values = changed[tag]
        if values is None:
            edited[at : at + 2] = (65535).to_bytes(2, order)  # a number that is no tag
            continue
        size = _TIFF_BYTES[int.from_bytes(data[at + 2 : at + 4], order)]
        place, content = at + entry_bytes - inline, b"".join(value.to_bytes(size, order) for value in values)
        if len(content) > inline:
            edited[place : place + inline] = len(edited).to_bytes(inline, order)
            edited += content
        else:
            edited[place : place + inline] = content.ljust(inline, b"\0")
        edited[at + 4 : place] = len(values).to_bytes(inline, order)
    return bytes(edited)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # noqa: BLE001 - the metadata is damaged, the pixels are not
        logger.debug("EXIF ignored: %s", error)
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return _grey16_to_rgb(image)
    if image.mode in ("I", "F"):
        layout = f"{image.format} with 32-bit or float pixels"
        if isinstance(image, TiffImageFile):
            layout = f"{_layout(image.tag_v2)}:"
        raise ImageError(f"{layout} has no known white level: convert it to 8 or 16 bits, unsigned")
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr"):
        raise ImageError(f"{image.format} with colour mode {image.mode} is not supported: convert it to RGB")
    # Alpha is dropped. Otherwise Pillow would warn about it, or search the palette for a free entry.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    white, inverted = 65535, False
    if isinstance(image, TiffImageFile):
        white = 2 ** image.tag_v2[BITSPERSAMPLE][0] - 1
        # Pillow inverts white-is-zero images of 8 bits itself, but not those of 16.
        inverted = image.tag_v2[PHOTOMETRIC_INTERPRETATION] == 0
    grey = (np.asarray(image).astype(np.uint32) * 255 + white // 2) // white
    if inverted:
        grey = 255 - grey
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
