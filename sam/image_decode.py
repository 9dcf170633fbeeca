"""Image decoding: bytes of a file to RGB pixels, with a defined policy for every kind of image in photo folders."""

from __future__ import annotations

import io
import logging

import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..common.errors import ImageError

logger = logging.getLogger(__name__)

MAX_PIXELS = 200_000_000
"""Largest image that is decoded, in pixels: enough for 200-megapixel cameras (800 MB while decoding)."""

_MAGIC: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"RIFF", WebPImageFile),
    (b"GIF8", GifImageFile),
    (b"BM", BmpImageFile),
    (b"II*\0", TiffImageFile),
    (b"MM\0*", TiffImageFile),
    (b"II+\0", TiffImageFile),
    (b"MM\0+", TiffImageFile),
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

    The format (JPEG, PNG, WebP, BMP, TIFF or GIF) is recognised by the content, never by the name. Policies:
    - EXIF orientation is applied; an unreadable or invalid one is ignored.
    - Alpha (RGBA, LA, in a palette or as one transparent colour) is dropped without blending, as by
      `Image.convert("RGB")` and OpenCV.
    - Grey and 1-bit images are repeated over the three channels. 16-bit grey is scaled by its full range (65535
      becomes 255, rounded), not clipped; Pillow reduces 16-bit colour to the high bytes. 32-bit and float pixels
      have no defined white level and are refused.
    - CMYK and YCCK, including Adobe's inverted variants, are converted by Pillow's simple formula.
    - ICC profiles and gamma are not applied, as in SAM's own code.
    - Of several frames or pages the first one is used.

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
    image = _open(data)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"too large: {width} x {height} is {width * height:,} pixels, the limit is {MAX_PIXELS:,}"
        )
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


def exif_orientation(data: bytes) -> int:
    """Return the EXIF orientation of an image file, 1 to 8: 5 to 8 exchange width and height. 1 if it states none.

    Args:
        data: the file's bytes.

    Raises:
        ImageError: it is no image file.
    """
    return _orientation(_open(data))


def _open(data: bytes) -> ImageFile.ImageFile:
    """Read the header with Pillow's class of the format: `Image.open` has a global pixel limit of its own."""
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    for magic, opener in _MAGIC:
        if data.startswith(magic) and (opener is not WebPImageFile or data[8:12] == b"WEBP"):
            break
    else:
        raise ImageError(
            f"not a JPEG, PNG, WebP, BMP, TIFF or GIF image: {len(data):,} bytes, the first are {bytes(data[:8])!r}"
        )
    try:
        return opener(io.BytesIO(data))
    except Exception as error:  # parsers raise anything for damaged bytes
        raise ImageError(_reason(opener, error)) from error


def _reason(image: ImageFile.ImageFile | type[ImageFile.ImageFile], error: Exception) -> str:
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"damaged or truncated {image.format}: {detail}"


def _orientation(image: ImageFile.ImageFile) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # noqa: BLE001 - the metadata is damaged, the pixels are not
        logger.debug("EXIF ignored: %s", error)
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return _grey16_to_rgb(image)
    if image.mode in ("I", "F"):
        raise ImageError(
            f"{image.format} with 32-bit or float pixels has no known white level: convert it to 8 or 16 bits"
        )
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr"):
        raise ImageError(f"{image.format} with colour mode {image.mode} is not supported: convert it to RGB")
    # Alpha is dropped. Otherwise Pillow would warn about it, or search the palette for a free entry.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _grey16_to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    white, inverted = 65535, False
    if isinstance(image, TiffImageFile):
        white = 2 ** image.tag_v2[BITSPERSAMPLE][0] - 1
        # Pillow inverts white-is-zero images of 8 bits itself, but not those of 16.
        inverted = image.tag_v2[PHOTOMETRIC_INTERPRETATION] == 0
    grey = (np.asarray(image).astype(np.uint32) * 255 + white // 2) // white
    if inverted:
        grey = 255 - grey
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
