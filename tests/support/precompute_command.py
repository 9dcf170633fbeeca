"""`mobilesam precompute` as users start it: in a process of its own, with worker processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mobilesam.store import EmbeddingStore


def command_of(photos: Path, out: Path, *options: str) -> list[str]:
    """The command line over a folder of photos, by the smallest teacher, with `--json`."""
    return [
        sys.executable, "-m", "mobilesam", "precompute", "--images", str(photos), "--out", str(out),
        "--teacher", "vit_nano", "--image-size", "64", "--json", *options,
    ]  # fmt: skip


def run_command(photos: Path, out: Path, *options: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Run it to its end, which must be good, and give its result."""
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
    """Inode and content of every shard file, by name."""
    return {file.name: (file.stat().st_ino, file.read_bytes()) for file in (path / "embeddings").glob("c.*")}


def contents(path: Path) -> dict[str, bytes]:
    """Content of every shard file, by name."""
    return {name: data for name, (_, data) in shard_files(path).items()}


def committed(path: Path) -> int:
    """How many shards are listed; 0 while there is no store yet."""
    try:
        with EmbeddingStore.open(path) as store:
            return len(store.manifest.committed_shards())
    except Exception:  # noqa: BLE001 - it is being made
        return 0


def preload(folder: Path, text: str) -> dict[str, str]:
    """Environment in which dask's workers run some code first."""
    script = folder / "preload.py"
    script.write_text(text)
    return {"DASK_DISTRIBUTED__WORKER__PRELOAD": str(script)}
