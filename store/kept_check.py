"""A shard's kept images against its listing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .file_check import FileCheck, Finding, is_zero
from .kept_images import BLOCK, END, header, padding, tar_bytes
from .layout import crc32c
from .listing import ShardListing
from .records import ImageRecord, KeptImage


class TarCheck(FileCheck):
    """A shard's tar: its length, and every member's header and bytes."""

    def __init__(self, path: Path, kind: str, listing: ShardListing) -> None:
        super().__init__(path, listing)
        self._kind = kind

    def _examine(self, descriptor: int) -> Iterator[Finding]:
        kept = [
            (record, record.kept)
            for record in self._listing.records
            if record.status == "done" and record.kept is not None
        ]
        size, expected = os.fstat(descriptor).st_size, tar_bytes(image for _, image in kept)
        # Where a row's listing is damaged, the length of its image isn't known; every tar has an end.
        if size < len(END) or (size != expected and not self._listing.problems):
            yield self._short(size, expected)
        elif kept and is_zero(descriptor, size):
            yield self._of_file("zeros", f"the file is nothing but zero bytes: {self._images()} are lost")
        else:
            for record, image in kept:
                yield from self._compare(descriptor, record, image)
            if os.pread(descriptor, len(END), size - len(END)) != END:
                yield self._of_file("checksum", "the tar's end is damaged, though its images may be whole")

    def _compare(self, descriptor: int, record: ImageRecord, image: KeptImage) -> Iterator[Finding]:
        block = header(record.row, self._kind, image.bytes)
        filled = image.bytes + padding(image.bytes)
        found = os.pread(descriptor, BLOCK + filled, image.offset - BLOCK)
        if crc32c(found[BLOCK : BLOCK + image.bytes]) != image.crc32c:
            message = "the image kept of it is not the one that was written: its checksum is another"
        elif found[:BLOCK] != block or any(found[BLOCK + image.bytes :]):
            message = "the image kept of it is whole, but what the tar has around it is damaged"
        else:
            return
        yield self._of_row("checksum", message, record.row, record.key)
