"""What names a JSON value: its SHA-256, whole or short enough for a folder."""

from __future__ import annotations

import hashlib
import json


def json_sha256(value: object) -> str:
    """Hex SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest(*parts: object) -> str:
    """Eight hexadecimal digits of the SHA-256 of some JSON values: short enough for a folder's name."""
    return json_sha256(parts)[:8]
