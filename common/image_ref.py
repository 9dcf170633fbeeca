"""Reference to one image, as it travels from the listing to the manifest and to the workers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """One image file, or one member of a tar."""

    key: str
    """Path below the image root, separated by "/", with bytes that are not UTF-8 as surrogates; a tar acts as a
    folder."""
    size: int
    """Length of the file in bytes, as listed."""
    offset: int | None = None
    """Byte in its tar at which a member's content begins; None for a file that is not in a tar."""
