"""Between the manifest's tables and records: SQL rows in and out, verified by the digest that they carry."""

from __future__ import annotations

import os

from .digests import row_digest
from .errors import StoreDamaged
from .records import ImageRecord, KeptImage, RowResult

_SELECT = """
SELECT row, key, size, "offset", reason, sha256, bytes, height, width, resized_height, resized_width, crc32c,
       scales_crc32c, kept_offset, kept_bytes, kept_crc32c, results.row IS NOT NULL, results.digest
"""

SELECT_RECORDS = f"{_SELECT} FROM images LEFT JOIN results USING (row)"

SELECT_LISTED = f"{_SELECT} FROM results CROSS JOIN images USING (row)"
"""Of rows with results alone. SQLite keeps the order of a CROSS JOIN: few failed rows are found by their index."""


def record_of(fields: tuple) -> ImageRecord:
    """The record in a row of one of these; StoreDamaged when it isn't what was committed."""
    *content, listed, digest = fields
    (row, key, size, offset, reason, sha256, length, height, width, resized_height, resized_width,
     crc, scales_crc, *kept) = content  # fmt: skip
    if not isinstance(key, bytes) or (listed and row_digest(tuple(content)) != digest):
        raise StoreDamaged(
            f"the manifest's row {row} is damaged (its checksum is not that of its fields): take its shard out with "
            "mobilesam inspect STORE --repair, and compute it anew"
        )
    return ImageRecord(
        row=row,
        key=os.fsdecode(key),
        status="pending" if not listed else "done" if reason is None else "failed",
        reason=reason,
        sha256=None if sha256 is None else sha256.hex(),
        bytes=length,
        original_size=None if height is None else (height, width),
        resized_size=None if resized_height is None else (resized_height, resized_width),
        crc32c=crc,
        scales_crc32c=scales_crc,
        kept=None if kept[0] is None else KeptImage(offset=kept[0], bytes=kept[1], crc32c=kept[2]),
        offset=offset,
        size=size,
    )


def result_fields(result: RowResult) -> tuple:
    """A result as the table `results` holds it, less the digest."""
    kept = result.kept
    return (
        result.row,
        result.reason,
        None if result.sha256 is None else bytes.fromhex(result.sha256),
        result.bytes,
        *(result.original_size or (None, None)),
        *(result.resized_size or (None, None)),
        result.crc32c,
        result.scales_crc32c,
        *((kept.offset, kept.bytes, kept.crc32c) if kept else (None, None, None)),
    )
