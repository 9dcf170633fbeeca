"""SAM's prompt encoder and mask decoder beside the embeddings: one safetensors file, identified by its SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..common.durable import explain_os_errors, write_atomic
from ..common.errors import StoreDamaged, StoreError, StoreMismatch

_MEND = "run the same mobilesam precompute again, which restores it"


def encode_head(tensors: Mapping[str, np.ndarray]) -> tuple[bytes, str]:
    """Encode SAM's prompt encoder and mask decoder as safetensors.

    Args:
        tensors: weights by name: `prompt_encoder.*`, `mask_decoder.*`.

    Returns:
        The file's bytes, the same for equal tensors in any order, and their SHA-256 in hex.
    """
    from safetensors.numpy import save

    data = save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})
    return data, hashlib.sha256(data).hexdigest()


def read_head(path: Path, sha256: str) -> bytes:
    """Read the file of SAM's prompt encoder and mask decoder.

    Args:
        path: safetensors file.
        sha256: hash that it must have, in hex.

    Returns:
        The file's bytes.

    Raises:
        StoreDamaged: it is missing, or has another hash.
        StoreError: it can't be read.
    """
    try:
        with explain_os_errors(path):
            data = path.read_bytes()
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise StoreDamaged(f"{path} is missing: {_MEND}") from error
        raise
    if hashlib.sha256(data).hexdigest() != sha256:
        raise StoreDamaged(f"{path} is not the file that was stored with this store: {_MEND}")
    return data


def write_head(path: Path, data: bytes, sha256: str) -> None:
    """Write the file of SAM's prompt encoder and mask decoder, atomically.

    Args:
        path: safetensors file to write or replace.
        data: its bytes, as `encode_head` makes them.
        sha256: hash that they must have, in hex.

    Raises:
        StoreMismatch: the bytes have another hash; nothing is written.
        StoreError: the file can't be written.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise StoreMismatch(
            f"this head (SHA-256 {found[:16]}) is not the one that {path} was made with ({sha256[:16]}): "
            "give the checkpoint that the store was made with"
        )
    with explain_os_errors(path):
        write_atomic(path, data)
