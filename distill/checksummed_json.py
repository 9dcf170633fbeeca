"""JSON that carries a checksum of itself: whole files (SHA-256), the lines of a log (CRC-32); and digests of values.

Both stay plain JSON to every other reader: the checksum is one more key, the last one.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.durable import write_atomic
from ..common.errors import DistillError

_FILE_KEY = "sha256"
_LINE_KEY = "crc32"
_PAGE = 100_000
"""Integers that are turned into text at a time."""


def write_checksummed(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as JSON with its SHA-256, atomically and durably.

    Args:
        path: file to create or replace.
        value: JSON object without the key `sha256`.
    """
    write_atomic(path, json.dumps({**value, _FILE_KEY: json_sha256(value)}, indent=1).encode() + b"\n")


def write_checksummed_integers(path: Path, value: Mapping[str, Sequence[int]]) -> None:
    """Write an object of lists of integers as `write_checksummed` does, byte for byte, but in little memory.

    Args:
        path: file to create or replace.
        value: lists of integers by key, without the key `sha256`; none is empty.
    """
    lines = [f" {json.dumps(key)}: [\n  {_lines(numbers)}\n ]" for key, numbers in value.items()]
    lines.append(f' {json.dumps(_FILE_KEY)}: "{integers_sha256(value)}"')
    write_atomic(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def integers_sha256(value: Mapping[str, Sequence[int]]) -> str:
    """Return `json_sha256` of an object of lists of integers, in little memory."""
    hashed = hashlib.sha256(b"{")
    for number, key in enumerate(sorted(value)):
        hashed.update(f"{',' if number else ''}{json.dumps(key)}:[".encode())
        for first in range(0, len(value[key]), _PAGE):
            page = ",".join(map(str, value[key][first : first + _PAGE]))
            hashed.update(f"{',' if first else ''}{page}".encode())
        hashed.update(b"]")
    hashed.update(b"}")
    return hashed.hexdigest()


def _lines(numbers: Sequence[int]) -> str:
    separator, firsts = ",\n  ", range(0, len(numbers), _PAGE)
    return separator.join(separator.join(map(str, numbers[first : first + _PAGE])) for first in firsts)


def read_checksummed(path: Path) -> dict[str, Any]:
    """Read a file written by `write_checksummed`; the checksum is left out of the result.

    Raises:
        DistillError: the file is missing or damaged; the caller adds a remedy to the message.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DistillError(f"{path} is missing or damaged ({reason})") from error
    if not isinstance(value, dict) or value.pop(_FILE_KEY, None) != json_sha256(value):
        raise DistillError(f"{path} is damaged: its SHA-256 isn't the one it was written with")
    return value


def is_checksummed(path: Path) -> bool:
    """Return True if a file has a checksum of `write_checksummed`, even if it was damaged since."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get(_FILE_KEY), str)


def encode_line(value: Mapping[str, Any]) -> bytes:
    """Return one line of JSON; its last key is the CRC-32 (8 hexadecimal digits) of the line without that key.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return text[:-1] + b',"%s":"%08x"}\n' % (_LINE_KEY.encode(), zlib.crc32(text))


def decode_line(line: bytes) -> dict[str, Any]:
    """Parse a line of `encode_line`, and return its object without the checksum.

    Args:
        line: the line without its newline.

    Raises:
        ValueError: the checksum is wrong.
    """
    text, _, found = line.rpartition(b',"%s":"' % _LINE_KEY.encode())
    text += b"}"
    if found != b'%08x"}' % zlib.crc32(text):
        raise ValueError("its checksum is wrong")
    value: dict[str, Any] = json.loads(text)
    return value


def decode_lines(path: Path, lines: list[bytes]) -> list[dict[str, Any]]:
    """Decode the lines of a log.

    Args:
        path: the log's path, for messages.
        lines: its lines without newlines.

    Raises:
        DistillError: a line is damaged; the message names the first.
    """
    decoded = []
    for number, line in enumerate(lines, 1):
        try:
            decoded.append(decode_line(line))
        except ValueError as error:
            raise DistillError(
                f"{path} is damaged in line {number} of {len(lines)} ({error}); put back a whole copy, or give "
                "--restart to start over"
            ) from error
    return decoded


def json_sha256(value: object) -> str:
    """Return the hexadecimal SHA-256 of a JSON value; the order of keys doesn't affect it."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest(*values: object) -> str:
    """Return eight hexadecimal digits of the SHA-256 of JSON values: short enough for a folder's name."""
    return json_sha256(values)[:8]
