"""Speed of whole precompute runs against their teacher and their decoding alone.

    python -m benchmarks.pipeline

embeds generated photos of 1500 x 2250 pixels with SAM's ViT-B, from a random checkpoint in the official format, by
`mobilesam precompute`. Before and after, it measures the same teacher alone on the same photos, in a process like a
worker's, and segment_anything's loop of `SamPredictor.set_image`. The figure is images a second times the seconds
that an image needs at least: 1 means that nothing is lost between the parts.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from segment_anything import sam_model_registry

from benchmarks.support.figures import Figure, report
from benchmarks.support.jpeg_decoders import compare_decoders
from benchmarks.support.pictures import make_large_photos
from benchmarks.support.processes import in_a_new_process
from benchmarks.support.teacher_seconds import embedding_seconds, loop_seconds
from benchmarks.support.timeline import watched_spans
from mobilesam.precompute import PrecomputeConfig, precompute
from mobilesam.precompute.cluster import local_devices

SHARE_TARGET = 0.97
LOOP_TARGET = 1.0
PEER_IMAGE_SIZE = 1024
COMPARED = 4
"""Photos that JPEG decoders are compared on."""


@click.command()
@click.option("--photos", default=24, show_default=True, help="Photos to generate and embed.")
@click.option("--teacher", type=click.Choice(["vit_h", "vit_l", "vit_b", "vit_nano"]), default="vit_b")
@click.option(
    "--rounds", default=6, show_default=True, help="Photos for the teacher alone, before and after."
)
@click.option("--shard-size", type=int, help="Photos in a shard  [default: as precompute chooses]")
@click.option(
    "--height",
    default=1500,
    show_default=True,
    help="Height of the photos in pixels; they are 1.5 times as wide.",
)
@click.option("--image-size", default=1024, show_default=True, help="Side of the teacher's square in pixels.")
@click.option("--json", "as_json", is_flag=True)
def main(
    photos: int,
    teacher: str,
    rounds: int,
    shard_size: int | None,
    height: int,
    image_size: int,
    as_json: bool,
) -> None:
    """Print the speed of precompute against its teacher alone, and against segment_anything's loop."""
    with tempfile.TemporaryDirectory(prefix="pipeline-") as temporary:
        folder = Path(temporary)
        root = make_large_photos(folder / "photos", photos, height, height * 3 // 2)
        config = PrecomputeConfig(
            images=(root,),
            out=folder / "store.zarr",
            teacher=teacher,
            checkpoint=None if teacher == "vit_nano" else write_checkpoint(teacher, folder / "teacher.pth"),
            image_size=image_size,
            shard_size=shard_size,
            audit=0,
        )
        files = sorted(root.iterdir())
        alone, loop = _by_themselves(config, files[:rounds])
        with watched_spans() as spans:
            result = precompute(config)
        alone_after, loop_after = _by_themselves(config, files[:rounds])
        alone, loop = alone + alone_after, loop + loop_after
        devices = len(local_devices(config))
        figures = [_share(result, median(alone) / devices), _against_loop(result, loop)]
        notes = [
            *_pieces(result, alone),
            *spans.lines(),
            *compare_decoders(files[:COMPARED], image_size, rounds),
        ]
    report(figures, notes, as_json=as_json)


def _by_themselves(config: PrecomputeConfig, files: Sequence[Path]) -> tuple[list[float], list[float]]:
    """Return seconds an image of the teacher alone, and of segment_anything's slow loop on half as many photos."""
    assert config.teacher is not None
    assert config.image_size is not None
    alone = in_a_new_process(embedding_seconds, config.teacher, config.checkpoint, config.image_size, files)
    if config.checkpoint is None or config.image_size != PEER_IMAGE_SIZE:
        return alone, []
    few = files[: -(-len(files) // 2)]
    return alone, in_a_new_process(loop_seconds, config.teacher, config.checkpoint, few)


def _share(result: dict[str, Any], encoder: float) -> Figure:
    """Compare the run with `encoder`, the seconds an image of all devices together, and its decoding."""
    cores = len(os.sched_getaffinity(0))
    decoding = result["decode_seconds"] / result["done"]
    rate = result["images_per_second"]
    return Figure(
        what="precompute: images/s x (encoder s + decode CPU s / cores)",
        value=rate * (encoder + decoding / cores),
        target=SHARE_TARGET,
        sides=f"{rate:.4g} images/s x ({encoder:.4g} + {decoding:.3g} / {cores}) s",
    )


def _against_loop(result: dict[str, Any], loop: Sequence[float]) -> Figure:
    what = "precompute / loop of SamPredictor.set_image in float32"
    if not loop:
        why = f"segment_anything runs only its own ViTs, at {PEER_IMAGE_SIZE} pixels"
        return Figure(what=what, value=None, target=LOOP_TARGET, sides=why)
    rate = result["images_per_second"]
    sides = f"{rate:.4g} / {1 / median(loop):.4g} images/s"
    return Figure(what=what, value=rate * median(loop), target=LOOP_TARGET, sides=sides)


def _pieces(result: dict[str, Any], alone: Sequence[float]) -> list[str]:
    decoding = result["decode_seconds"] / result["done"]
    return [
        f"teacher_share {result['teacher_share']:.4g}; decoding {1000 * decoding:.3g} ms of CPU per image, "
        f"{1 / decoding:.3g} images/s per core",
        "seconds per image of the teacher alone, before and after the run: "
        + ", ".join(f"{t:.4g}" for t in alone),
    ]


def write_checkpoint(teacher: str, path: Path) -> Path:
    """Write random weights of segment_anything's own class in the official format; return `path`."""
    torch.manual_seed(0)
    torch.save(sam_model_registry[teacher]().state_dict(), path)
    return path


if __name__ == "__main__":
    main()
