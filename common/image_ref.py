"""Reference to one image: what travels from the listing to the manifest and to the workers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """One image file, or one member of a tar.

    `key` is the path below the image root, "/"-separated, bytes that are not UTF-8 as surrogates; a tar acts as a
    folder. `size` is the file's length in bytes as listed. `offset` is where a tar member's bytes begin in its tar;
    None for a file of its own.
    """

    key: str
    size: int
    offset: int | None = None
