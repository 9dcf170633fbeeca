"""What SAM defines: images as it wants them, checkpoints, and every architecture that SAM weights exist for.

Names are loaded on first use, so that importing this package costs nothing (neither torch, numpy nor Pillow).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decode import MAX_PIXELS, decode_image
    from .errors import CheckpointError, DownloadError, ImageError, SamError
    from .images import (
        DecodedImage,
        load_image,
        place_on_canvas,
        preprocessing_recipe,
        resize_longest_side,
        resized_size,
        valid_cells,
    )
    from .normalize import normalize_and_pad
    from .read import read_checked, read_image
    from .sources import ImageFile, ImageSet, Problem, list_images, shown
    from .subset import in_fraction

_HOME = {
    "MAX_PIXELS": "decode",
    "decode_image": "decode",
    "CheckpointError": "errors",
    "DownloadError": "errors",
    "ImageError": "errors",
    "SamError": "errors",
    "DecodedImage": "images",
    "load_image": "images",
    "place_on_canvas": "images",
    "preprocessing_recipe": "images",
    "resize_longest_side": "images",
    "resized_size": "images",
    "valid_cells": "images",
    "normalize_and_pad": "normalize",
    "ImageFile": "sources",
    "ImageSet": "sources",
    "Problem": "sources",
    "list_images": "sources",
    "shown": "sources",
    "read_checked": "read",
    "read_image": "read",
    "in_fraction": "subset",
}

__all__ = [
    "MAX_PIXELS",
    "CheckpointError",
    "DecodedImage",
    "DownloadError",
    "ImageError",
    "ImageFile",
    "ImageSet",
    "Problem",
    "SamError",
    "decode_image",
    "in_fraction",
    "list_images",
    "load_image",
    "normalize_and_pad",
    "place_on_canvas",
    "preprocessing_recipe",
    "read_checked",
    "read_image",
    "resize_longest_side",
    "resized_size",
    "shown",
    "valid_cells",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
