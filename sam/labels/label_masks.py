"""Label masks: a folder of PNGs named like the photos, in which each object has an integer of its own.

Shape suffixes: H and W rows and columns of a mask, P objects of one image, N runs of equal pixels,
4 (x0, y0, x1, y1).
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...common.errors import AnnotationError, BadAnnotation, shown
from ..photos.image_decode import MAX_PIXELS
from .annotations import MOST_OBJECTS, Annotations, Turn, check_size
from .coco import NameMatch, match_names
from .rle import Runs, runs_box, write_runs

SUFFIX = ".png"

MAX_BYTES = 256 * 2**20
"""Largest PNG that is read, in bytes."""

VOID = 255
"""Index that PASCAL VOC's palette PNGs give to pixels that belong to no object for sure."""

VOID_REASON = "void (index 255 of a palette)"

INTEGERS = ("1", "L", "P", "I", "I;16")
"""Pillow's modes of PNGs with one integer a pixel: 1 to 8 bits of grey, palette, 16 bits of grey."""


class LabelMasks:
    """Masks of objects from PNGs below one folder: NAME.png for NAME.jpg, 0 is background.

    Each other value is an object, whose mask may have several parts. Threads may share it.

    Args:
        folder: folder of the PNGs; subfolders are searched, too.

    Raises:
        AnnotationError: there is no such folder, or no PNG in it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder)
        if not self.path.is_dir():
            raise AnnotationError(f"{shown(str(folder))} is no folder of label masks")
        self.names = sorted(
            os.path.relpath(os.path.join(parent, name), self.path)
            for parent, _, names in os.walk(self.path, followlinks=True)
            for name in names
            if name.lower().endswith(SUFFIX) and not name.startswith(".")
        )
        if not self.names:
            raise AnnotationError(
                f"{shown(str(folder))} has no label masks: PNGs named like the photos, as 1.png for 1.jpg"
            )
        self._match: NameMatch | None = None

    def __len__(self) -> int:
        return len(self.names)

    def match(self, keys: Iterable[str], root: Path | None = None) -> NameMatch:
        """Match the PNGs' names with the keys of all images; from then on, only these images are read.

        Args:
            keys: keys of all images, as `list_images` returns them.
            root: folder that they are relative to, as in `match_names`.
        """
        self._match = match_names(self.names, keys, root=root, stems=True)
        return self._match

    def digest(self, keys: Iterable[str]) -> str:
        """Return the hexadecimal SHA-256 of the keys that have a mask, and of their masks' files.

        Args:
            keys: keys of images, in any order.

        Raises:
            AnnotationError: a file can't be read.
        """
        total = hashlib.sha256()
        for key in sorted(keys, key=os.fsencode):
            name = self._find(key)
            if name is not None:
                content = hashlib.sha256(self._read(key, name)).digest()
                total.update(hashlib.sha256(os.fsencode(key)).digest() + content)
        return total.hexdigest()

    def has_labels(self, key: str) -> bool:
        """Return True if there is a mask of the image `key`."""
        return self._find(key) is not None

    def read(
        self, key: str, *, size: tuple[int, int] | None = None, turn: Turn | None = None
    ) -> Annotations | None:
        """Read the masks of an image.

        Args:
            key: key of the image.
            size: (height, width) of the upright image in pixels, if the caller knows it.
            turn: function that returns the EXIF orientation of the image's file, if the caller has it.

        Returns:
            One object for each value but 0; None if no PNG is named like the image.

        Raises:
            AnnotationError: the PNG is damaged, of another size, or has other than one integer a pixel. The message
                is one line, and names the image.
        """
        name = self._find(key)
        if name is None:
            return None
        try:
            data = self._read(key, name)
            return _objects(shown(name), data, size, turn)
        except BadAnnotation as error:
            raise AnnotationError(f"{shown(key)}: its mask {shown(name)}: {error}") from error

    def _find(self, key: str) -> str | None:
        match = self._match or match_names(self.names, [key], stems=True)
        position = match.found.get(key)
        return None if position is None else self.names[position]

    def _read(self, key: str, name: str) -> bytes:
        try:
            with open(self.path / name, "rb") as file:
                length = os.fstat(file.fileno()).st_size
                if length > MAX_BYTES:
                    raise BadAnnotation(f"it has {length:,} bytes, at most {MAX_BYTES:,} are read")
                return file.read()
        except OSError as error:
            raise AnnotationError(
                f"{shown(key)}: its mask {shown(name)} can't be read: {error.strerror or error}"
            ) from error


def _objects(source: str, data: bytes, size: tuple[int, int] | None, turn: Turn | None) -> Annotations:
    """Return the objects of a mask."""
    values_HW, mode = _decode(data, size, turn)
    height, width = values_HW.shape
    runs_of = _runs_by_value(values_HW)
    left_out: tuple[tuple[str, str], ...] = ()
    if mode == "P" and VOID in runs_of and len(runs_of) > 1:
        del runs_of[VOID]
        left_out = ((VOID_REASON, "pixels of no object, by the rule of PASCAL VOC"),)
    if len(runs_of) > MOST_OBJECTS:
        raise BadAnnotation(f"{len(runs_of):,} objects, at most {MOST_OBJECTS:,} are read")
    boxes = [runs_box(runs, height) for runs in runs_of.values()]
    return Annotations(
        source=source,
        size=(height, width),
        counts=tuple(map(write_runs, runs_of.values())),
        boxes_P4=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        areas_P=np.array([runs[1::2].sum() for runs in runs_of.values()], dtype=np.int64),
        left_out=left_out,
    )


def _decode(
    data: bytes, size: tuple[int, int] | None, turn: Turn | None
) -> tuple[npt.NDArray[np.int64], str]:
    """Return the integers of a PNG, int64 (H, W), and its mode; the size is checked before its pixels are decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadAnnotation(f"it is no PNG that can be read ({str(error)[:80]})") from error
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadAnnotation(f"it is {width} x {height}, the limit is {MAX_PIXELS:,} pixels")
        check_size((height, width), size, turn)
        mode = image.mode
        try:
            pixels = np.asarray(image)
        except Exception as error:  # decoders raise anything for damaged bytes
            raise BadAnnotation(f"it is damaged ({str(error)[:80]})") from error
    if mode in ("RGB", "RGBA", "LA"):
        pixels = _one_channel(pixels, mode)
    elif mode not in INTEGERS:
        raise BadAnnotation(_not_integers(mode))
    return pixels.astype(np.int64), mode


def _one_channel(pixels: npt.NDArray[Any], mode: str) -> npt.NDArray[Any]:
    """Return the grey value of a picture that was saved in colours or with alpha; it must be grey and opaque."""
    colours = pixels[..., : 1 if mode == "LA" else 3]
    opaque = mode == "RGB" or bool((pixels[..., -1] == 255).all())
    if not opaque or not bool((colours == colours[..., :1]).all()):
        raise BadAnnotation(_not_integers(mode))
    return colours[..., 0]


def _not_integers(mode: str) -> str:
    return (
        f"it has {mode} pixels, not one integer an object: save it as 8- or 16-bit grey or with a palette, 0 for the "
        "background"
    )


def _runs_by_value(values_HW: npt.NDArray[np.int64]) -> dict[int, Runs]:
    """Return the runs of the mask of each value but 0, in the order of the values."""
    flat = values_HW.T.ravel()  # RLE goes down the columns
    starts_N = np.flatnonzero(np.diff(flat, prepend=flat[0] - 1))
    ends_N = np.append(starts_N[1:], len(flat))
    value_N = flat[starts_N]
    order_N = np.argsort(value_N, kind="stable")
    order_N = order_N[value_N[order_N] != 0]
    values, firsts = np.unique(value_N[order_N], return_index=True)
    runs = {}
    for value, part_N in zip(values.tolist(), np.split(order_N, firsts[1:]), strict=False):
        edges_N = np.stack([starts_N[part_N], ends_N[part_N]], axis=1).ravel()
        edges_N = np.append(edges_N, len(flat))
        counts_N = np.diff(edges_N, prepend=0)
        runs[value] = counts_N if counts_N[-1] else counts_N[:-1]
    return runs
