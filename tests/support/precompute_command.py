"""`mobilesam precompute` in a subprocess with worker processes, as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mobilesam.store import EmbeddingStore


def command_of(photos: Path, out: Path, *options: str) -> list[str]:
    """Return the command line for a folder of photos with the smallest teacher and `--json`."""
    return [
        sys.executable, "-m", "mobilesam", "precompute", "--images", str(photos), "--out", str(out),
        "--teacher", "vit_nano", "--image-size", "64", "--json", *options,
    ]  # fmt: skip


def run_command(photos: Path, out: Path, *options: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Run the command, assert that it succeeds, and return its result."""
    done = subprocess.run(
        command_of(photos, out, *options),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | (env or {}),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shard_files(path: Path) -> dict[str, tuple[int, bytes]]:
    """Return {name: (inode, content)} of the shard files."""
    return {file.name: (file.stat().st_ino, file.read_bytes()) for file in (path / "embeddings").glob("c.*")}


def contents(path: Path) -> dict[str, bytes]:
    """Return {name: content} of the shard files."""
    return {name: data for name, (_, data) in shard_files(path).items()}


def committed(path: Path) -> int:
    """Return the number of committed shards; 0 while there is no store."""
    try:
        with EmbeddingStore.open(path) as store:
            return len(store.manifest.committed_shards())
    except Exception:  # noqa: BLE001 - the store is being created
        return 0


def preload(folder: Path, text: str) -> dict[str, str]:
    """Return environment variables that make dask's workers run some code first."""
    script = folder / "preload.py"
    script.write_text(text)
    return {"DASK_DISTRIBUTED__WORKER__PRELOAD": str(script)}
