"""Safetensors files that carry a SHA-256 of everything in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..store.durable import write_atomic
from .errors import DistillError

MAX_HEADER = 1 << 20
"""Largest header that is read, in bytes: thirty times TinyViT's. The format itself allows 100 MB."""

_DIGEST_KEY = "sha256"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Header:
    """What a file says of itself: metadata without its digest, and each tensor's shape."""

    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors (contiguous, on the CPU) and strings, with their SHA-256, atomically and durably."""
    tensors, metadata = dict(tensors), dict(metadata)
    data = save(tensors, metadata)
    length = int.from_bytes(data[:8], "little")
    digest = _digest(json.loads(data[8 : 8 + length]), [memoryview(data)[8 + length :]])
    write_atomic(path, save(tensors, {**metadata, _DIGEST_KEY: digest}))


def check_tensors(path: Path) -> Header:
    """Verifies a file's SHA-256 over metadata, names, types, shapes and bytes, a megabyte at a time.

    Raises DistillError, without a mend, when it is damaged or carries none. Raises OSError when it can't be read.
    """
    with open(path, "rb") as file:
        header = _read_header(path, file)
        try:
            metadata = {str(name): str(value) for name, value in header["__metadata__"].items()}
            shapes = {name: tuple(header[name]["shape"]) for name in header.keys() - {"__metadata__"}}
            wanted = metadata.pop(_DIGEST_KEY)
        except (KeyError, TypeError, AttributeError):
            raise DistillError(
                f"{path} carries no SHA-256 of its content: mobilesam didn't write it"
            ) from None
        header["__metadata__"] = metadata
        if _digest(header, iter(lambda: file.read(_CHUNK), b"")) != wanted:
            raise DistillError(f"{path} is damaged: its SHA-256 isn't the one it was written with")
    return Header(metadata=metadata, shapes=shapes)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that was checked, on the CPU; DistillError when they can't be what the header says."""
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise DistillError(f"{path} is damaged ({str(error)[:100]})") from error


def _read_header(path: Path, file: BinaryIO) -> dict[str, Any]:
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise DistillError(
            f"{path} is damaged or no safetensors file: a header of {length:,} bytes, {MAX_HEADER:,} at most"
        )
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise DistillError(f"{path} is damaged or no safetensors file: its header is no JSON object")
    return header


def _digest(header: Mapping[str, Any], data: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of the header, whatever the order of its keys, and all bytes after it."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    sha256 = hashlib.sha256(text.encode() + b"\n")
    for chunk in data:
        sha256.update(chunk)
    return sha256.hexdigest()
