"""Reference to one image, as the listing, the manifest and the workers pass it on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """One image file, or one member of a tar."""

    key: str
    """Path relative to the image root, separated by "/", with a tar as if it were a folder. Bytes that are not UTF-8
    are surrogates, as from `os.fsdecode`."""
    size: int
    """Length of the file in bytes, as listed."""
    offset: int | None = None
    """Byte of the tar at which the member's content begins; None for a file that is not in a tar."""
