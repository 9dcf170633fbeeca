"""JSON that carries a checksum of itself: whole files (SHA-256) and the lines of a log (CRC-32).

Both stay plain JSON to everybody else: the checksum is one more key, the last one.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..store.durable import write_atomic
from .digests import json_sha256
from .errors import DistillError

_FILE_KEY = "sha256"
_LINE_KEY = "crc32"


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as JSON with its SHA-256, atomically and durably."""
    write_atomic(path, json.dumps({**value, _FILE_KEY: json_sha256(value)}, indent=1).encode() + b"\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what write_sealed wrote; DistillError when the file is missing, damaged or not what was written."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DistillError(f"{path} is missing or damaged ({reason})") from error
    if not isinstance(value, dict) or value.pop(_FILE_KEY, None) != json_sha256(value):
        raise DistillError(f"{path} is damaged: its SHA-256 isn't the one it was written with")
    return value


def encode_line(value: Mapping[str, Any]) -> bytes:
    """One line of JSON, its last key the CRC-32 (hex) of the line as it would be without that key."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return text[:-1] + b',"%s":"%08x"}\n' % (_LINE_KEY.encode(), zlib.crc32(text))


def decode_line(line: bytes) -> dict[str, Any]:
    """The object of a line, which ends before its newline, without its checksum; ValueError if that is wrong."""
    text, _, found = line.rpartition(b',"%s":"' % _LINE_KEY.encode())
    text += b"}"
    if found != b'%08x"}' % zlib.crc32(text):
        raise ValueError("its checksum is wrong")
    value: dict[str, Any] = json.loads(text)
    return value
