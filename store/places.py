"""Where a store keeps what is not Zarr's."""

from __future__ import annotations

from pathlib import Path

PRIVATE = Path("embeddings") / "mobilesam"
"""Our own files' folder: inside an array's, into which Zarr readers don't look."""

MANIFEST = PRIVATE / "manifest.sqlite"
HEAD = PRIVATE / "sam_head.safetensors"
