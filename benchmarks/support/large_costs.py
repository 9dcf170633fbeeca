"""Time and memory of opening, inspecting and resuming a large store, and of starting on a large data set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.support.large_store import make_large_store
from benchmarks.support.synthetic_store import SHARD_SIZE
from mobilesam.store import shard_count
from mobilesam.store.layout import MANIFEST

ROOT = Path(__file__).parents[2]
TARGET_SECONDS = 3.0
PENDING_SHARDS = 10
Say = Callable[[str], None]

MANIFEST_PROBES = {
    "open, count rows": "count",
    "inspect": "inspect",
    "resume: open for writing, pending shards, records of the first": "resume",
}


def manifest_costs(folder: Path, rows: int, say: Say) -> dict[str, Any]:
    """Measure the seconds and peak memory of each probe on a store of `rows` rows, written here unless it exists.

    Each probe reads the manifest from the disk, then once more from the system's cache. The command
    `mobilesam inspect` follows.
    """
    store = folder / "large.zarr"
    shards = shard_count(rows, SHARD_SIZE)
    say(f"\nmanifest of {rows:,} rows, {shards - PENDING_SHARDS:,} of {shards:,} shards committed")
    if not store.exists():
        began = time.monotonic()
        make_large_store(
            store,
            rows,
            pending_shards=PENDING_SHARDS,
            image_size=1024,
            image_root=folder / "no-images",
            shard_files=True,
        )
        say(f"made in {time.monotonic() - began:.0f} s; shard files of full length, without content (sparse)")
    size = (store / MANIFEST).stat().st_size
    say(f"the manifest has {size / 2**20:,.0f} MiB, {size / rows:.0f} bytes per row")
    lines = []
    for what, probe in MANIFEST_PROBES.items():
        for where in ("disk", "cache"):
            if where == "disk":
                _drop_from_cache(store / MANIFEST)
            lines.append({"what": f"{what} ({where})", **_probe(probe, str(store)), "target": TARGET_SECONDS})
            say(_line(lines[-1]))
    lines.append({"what": "mobilesam inspect STORE, whole command", **_inspect_command(store)})
    say(_line(lines[-1]))
    return {"rows": rows, "shards": shards, "manifest_bytes": size, "lines": lines}


def start_costs(folder: Path, rows: int, say: Say) -> dict[str, Any]:
    """Measure the seconds and bytes an image that precompute and distill take before their first image.

    Computed from the difference between `rows` images and a tenth of them.
    """
    say(f"\nstart on {rows:,} images, and on a tenth")
    sizes = (rows // 10, rows)
    measured: dict[str, list[dict[str, Any]]] = {
        "precompute, new": [],
        "precompute, resumed": [],
        "distill": [],
    }
    for size in sizes:
        images, store = folder / f"empty-{size}", folder / f"start-{size}.zarr"
        _make_empty_files(images, size)
        for what in ("precompute, new", "precompute, resumed"):
            measured[what].append(_probe("start_precompute", str(images), str(store)))
        committed = folder / f"committed-{size}.zarr"
        make_large_store(
            committed, size, pending_shards=0, image_size=64, image_root=images / "none", shard_files=False
        )
        (images / "none").mkdir()
        measured["distill"].append(
            _probe("start_distill", str(committed), str(folder / f"run-{size}"), cwd=folder)
        )
    lines = [_slope(what, sizes, pair) for what, pair in measured.items()]
    for line in lines:
        say(
            f"{line['what']:20} {line['seconds']:7.1f} s, {line['peak_bytes'] / 2**20:6,.0f} MiB at most; per "
            f"million images {line['seconds_per_million']:6.1f} s, {line['bytes_per_image'] * 1e6 / 2**20:6,.0f} MiB "
            f"({line['bytes_per_image']:.0f} bytes per image)"
        )
    return {"rows": rows, "lines": lines}


def _slope(what: str, sizes: tuple[int, int], pair: list[dict[str, Any]]) -> dict[str, Any]:
    few, many = pair
    more = sizes[1] - sizes[0]
    return {
        "what": what,
        "seconds": many["seconds"],
        "peak_bytes": many["peak_bytes"],
        "seconds_per_million": (many["seconds"] - few["seconds"]) / more * 1e6,
        "bytes_per_image": (many["peak_bytes"] - few["peak_bytes"]) / more,
    }


def _probe(name: str, *arguments: str, cwd: Path | None = None) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.support.probe", name, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _inspect_command(store: Path) -> dict[str, Any]:
    began, before = time.monotonic(), os.times()
    done = subprocess.run(
        [sys.executable, "-m", "mobilesam", "inspect", str(store), "--json"],
        stdout=subprocess.PIPE,
        check=True,
    )
    seconds, after = time.monotonic() - began, os.times()
    return {
        "seconds": seconds,
        "processor_seconds": sum(after[2:4]) - sum(before[2:4]),
        "peak_bytes": None,
        "found": json.loads(done.stdout)["rows"],
        "target": TARGET_SECONDS,
    }


def _line(line: dict[str, Any]) -> str:
    peak = "" if line["peak_bytes"] is None else f", {line['peak_bytes'] / 2**20:,.0f} MiB at most"
    return (
        f"{line['what']:68} {line['seconds']:6.2f} s of {line['target']:.0f} allowed "
        f"({line['processor_seconds']:.2f} s of processor time){peak}"
    )


def _drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _make_empty_files(folder: Path, count: int) -> None:
    for number in range(count):
        below = folder / f"{number // 1000:06d}"
        if number % 1000 == 0:
            below.mkdir(parents=True)
        (below / f"sa_{number:08d}.jpg").touch()
