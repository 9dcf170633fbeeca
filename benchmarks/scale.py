"""Memory, descriptors and time over many images, and the cost of opening a store of all of SA-1B.

    python -m benchmarks.scale

prints curves of long runs of precompute and distill (memory, descriptors, time), the time and memory of opening,
inspecting and resuming a store of 11 million rows, and of starting on a million images. Start it from the
repository's root. On two cores it takes about an hour, three quarters of it TinyViT's (--student light is quicker,
and shows less).
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.support.curves import judge_curve, judgements_json, table, verdict
from benchmarks.support.large_costs import manifest_costs, start_costs
from benchmarks.support.machine import machine
from benchmarks.support.pictures import make_pictures

ROOT = Path(__file__).parents[1]
SIDE = 64
EMBEDDED = 3
"""Pictures embedded per picture trained on: SQLite's page cache needs the first 20,000 rows to fill its 2 MiB."""

VALIDATED = 1.05
"""Pictures in the store per picture trained on: distill keeps some for validation."""

SECTIONS = ("precompute", "distill", "manifest", "start")


@click.command(epilog="Exit code 1: something rises, or took longer than its target.")
@click.option(
    "--rows", default=20_000, help="Images to train on; three times as many are embedded.", show_default=True
)
@click.option("--manifest-rows", default=11_008_000, help="Rows of the large manifest.", show_default=True)
@click.option("--start-rows", default=1_000_000, help="Images to start on.", show_default=True)
@click.option("--student", type=click.Choice(["tiny_vit", "light"]), default="tiny_vit", show_default=True)
@click.option(
    "--only", type=click.Choice(SECTIONS), multiple=True, help="Section to run alone; may be repeated."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to work in, kept  [default: a temporary one]"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
def main(
    rows: int,
    manifest_rows: int,
    start_rows: int,
    student: str,
    only: tuple[str, ...],
    out: Path | None,
    as_json: bool,
) -> None:
    """Print memory, descriptors and time over many images, and the cost of large manifests."""
    say = functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)
    sections = only or SECTIONS
    result: dict[str, Any] = {"machine": machine()}
    say("\n".join(f"{name}: {value}" for name, value in result["machine"].items()))
    with tempfile.TemporaryDirectory(prefix="scale-") as temporary:
        folder = (out or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if "precompute" in sections or "distill" in sections:
            result |= _soaks(folder, rows, student, sections, say)
        if "manifest" in sections:
            result["manifest"] = manifest_costs(folder, manifest_rows, say)
        if "start" in sections:
            result["start"] = start_costs(folder, start_rows, say)
    bad = _bad(result)
    say(
        "\neverything is flat and within its target"
        if not bad
        else "\nnot as it should be: " + "; ".join(bad)
    )
    if as_json:
        print(json.dumps(result))
    sys.exit(1 if bad else 0)


def _soaks(
    folder: Path, rows: int, student: str, sections: tuple[str, ...], say: Callable[[str], None]
) -> dict[str, Any]:
    pictures = folder / "pictures"
    if pictures.exists():
        raise click.UsageError(f"{folder} has a soak in it already: give another --out")
    make_pictures(pictures, EMBEDDED * rows, SIDE)
    found: dict[str, Any] = {}
    if "precompute" in sections:
        found["precompute"] = _soak("precompute", folder, [], say)
    if "distill" in sections:
        images = str(int(VALIDATED * rows))
        found["distill"] = _soak("distill", folder, ["--student", student, "--images", images], say)
    return found


def _soak(what: str, folder: Path, options: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    say(f"\nsoak of {what} {' '.join(options)}".rstrip())
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", what, str(folder), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    judgements = judge_curve(found["points"])
    say("\n".join([*table(found["points"]), "", *verdict(judgements)]))
    say(f"{found['images']:,} images at {SIDE} px; {time.monotonic() - began:.0f} s with start and end")
    return found | {"judgements": judgements_json(judgements)}


def _bad(result: dict[str, Any]) -> list[str]:
    rising = [
        f"{what}: {name} rises"
        for what in ("precompute", "distill")
        for name, found in result.get(what, {}).get("judgements", {}).items()
        if not found["flat"]
    ]
    slow = [
        f"{line['what']} took {line['seconds']:.2f} s"
        for line in result.get("manifest", {}).get("lines", [])
        if line["seconds"] > line["target"]
    ]
    return rising + slow


if __name__ == "__main__":
    main()
