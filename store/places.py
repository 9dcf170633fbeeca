"""Where a store is, and where it keeps what is not Zarr's."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import StoreError

PRIVATE = Path("embeddings") / "mobilesam"
"""Our own files' folder: inside an array's, into which Zarr readers don't look."""

MANIFEST = PRIVATE / "manifest.sqlite"
HEAD = PRIVATE / "sam_head.safetensors"


def local_path(path: Path | str) -> Path:
    """The path as a Path; StoreError for a URL: stores are local folders so far."""
    # A Path has already made one slash of the two in s3://bucket.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise StoreError(
            f"{path}: stores on object storage are not supported yet; give a folder, or mount it"
        )
    return Path(path)
