"""What names a JSON value: its SHA-256, whole or short enough for a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..store import ImageRecord


def json_sha256(value: object) -> str:
    """Hex SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest(*parts: object) -> str:
    """Eight hexadecimal digits of the SHA-256 of some JSON values: short enough for a folder's name."""
    return json_sha256(parts)[:8]


def rows_digest(records: Iterable[ImageRecord]) -> str:
    """Of what committed rows hold: their images' and their embeddings' checksums."""
    return digest([(record.row, record.crc32c, record.scales_crc32c, record.sha256) for record in records])
