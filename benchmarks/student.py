"""Speed of the trainer's step against MobileSAM's own TinyViT, and a run's wait for data.

    python -m benchmarks.student

prints training images a second of MobileSAM's TinyViT (package mobilesam-mirror; float32, plain MSE, torch's AdamW)
and of our trainer's step, measured in turn on the same photos, and `data_wait_share` of a distill run on the example
photos. Weights are random: the time doesn't depend on them. Each step is measured in a process of its own, because on
a CPU distill keeps freed memory in its process (sam/allocator.py), and MobileSAM's users don't; a note gives
MobileSAM's speed with it.

    python -m benchmarks.student --profile

adds the shares of the steps' time by kind of operator.
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

from benchmarks.support.figures import EMULATED, Figure, report
from benchmarks.support.pictures import PHOTOS
from benchmarks.support.processes import in_a_new_process
from benchmarks.support.synthetic_store import make_photo_store
from benchmarks.support.training_step import PEER_IMAGE_SIZE, Side, step_seconds, step_shares
from mobilesam.distill import DistillConfig, distill
from mobilesam.precompute import PrecomputeConfig, precompute
from mobilesam.sam.device import accelerates_bfloat16, resolve_device

PEER = "MobileSAM float32"
PEER_KEPT = "MobileSAM float32, freed memory kept"
BEST_TARGET = 2.6
"""Target for our step over MobileSAM's, in the precision that `--precision auto` takes."""

OTHER_TARGET = 1.0
WAIT_TARGET = 0.01


@click.command()
@click.option(
    "--micro-batch", type=int, help="Images of a step, in one forward pass  [default: 2; on a GPU 8]"
)
@click.option("--steps", type=int, help="Steps timed back to back  [default: 1; on a GPU 20]")
@click.option("--rounds", default=3, show_default=True, help="Timed steps; the median counts.")
@click.option(
    "--epochs",
    default=2,
    show_default=True,
    help="Epochs of the run whose wait for data is measured; 0: no run.",
)
@click.option("--image-size", default=1024, show_default=True, help="Side of the encoder's square in pixels.")
@click.option("--device", default="auto", show_default=True)
@click.option("--emulated", is_flag=True, help="Measure bfloat16 also where the processor only emulates it.")
@click.option("--profile", is_flag=True, help="Also print shares of the time by kind of operator.")
@click.option("--json", "as_json", is_flag=True)
def main(
    micro_batch: int | None,
    steps: int | None,
    rounds: int,
    epochs: int,
    image_size: int,
    device: str,
    emulated: bool,
    profile: bool,
    as_json: bool,
) -> None:
    """Print the speed of training, ours against MobileSAM's TinyViT, and the wait for data."""
    where = resolve_device(device)
    accelerated = accelerates_bfloat16(where)
    micro_batch = micro_batch or (2 if where.type == "cpu" else 8)
    steps = steps or (1 if where.type == "cpu" else 20)
    sides = _sides(image_size, where, bfloat16=emulated or accelerated)
    with tempfile.TemporaryDirectory(prefix="student-") as temporary:
        folder = Path(temporary)
        arguments = make_photo_store(folder / "step.zarr", PHOTOS, image_size), micro_batch, where
        times: dict[str, list[float]] = {side.name: [] for side in sides}
        for _ in range(rounds):
            for side in sides:
                times[side.name].append(in_a_new_process(step_seconds, side, *arguments, steps))
        rates = {name: micro_batch / median(found) for name, found in times.items()}
        notes = [
            f"{name}: {rate:.4g} images/s, {micro_batch} images per step" for name, rate in rates.items()
        ]
        if profile:
            notes += [line for side in sides for line in in_a_new_process(step_shares, side, *arguments)]
        figures = _speeds(rates, accelerated)
        if epochs:
            figures.append(_wait(folder / "run", epochs, image_size, where))
    report(figures, notes, as_json=as_json)


def _sides(image_size: int, device: torch.device, *, bfloat16: bool) -> Sequence[Side]:
    """Return the steps that can be measured, MobileSAM's first."""
    keeps = device.type == "cpu"
    sides = []
    if image_size == PEER_IMAGE_SIZE:
        sides.append(Side(name=PEER, ours=False, precision="float32", keeps_memory=False))
        if keeps:
            sides.append(Side(name=PEER_KEPT, ours=False, precision="float32", keeps_memory=True))
    for precision in ("float32", "bfloat16") if bfloat16 else ("float32",):
        sides.append(Side(name=f"ours {precision}", ours=True, precision=precision, keeps_memory=keeps))
    return sides


def _speeds(rates: dict[str, float], accelerated: bool) -> list[Figure]:
    """Compare our step with MobileSAM's in both precisions; the main target is for the one that `auto` takes."""
    figures = []
    for precision, best in (("float32", not accelerated), ("bfloat16", accelerated)):
        what = f"training step: ours {precision}{' (auto here)' if best else ''} / {PEER}"
        target = OTHER_TARGET if precision == "float32" and not best else BEST_TARGET
        ours, theirs = rates.get(f"ours {precision}"), rates.get(PEER)
        if ours is None or theirs is None:
            why = EMULATED if ours is None else f"MobileSAM's code takes only {PEER_IMAGE_SIZE} pixels"
            figures.append(Figure(what=what, value=None, target=target, sides=why))
            continue
        sides = f"{ours:.4g} / {theirs:.4g} images/s"
        figures.append(Figure(what=what, value=ours / theirs, target=target, sides=sides))
    return figures


def _wait(folder: Path, epochs: int, image_size: int, device: torch.device) -> Figure:
    """Measure the share of a real run's training time that is a wait for data."""
    folder.mkdir()
    store, where = folder / "run.zarr", str(device)
    precompute(
        PrecomputeConfig(images=(PHOTOS,), out=store, teacher="vit_nano", image_size=image_size, device=where)
    )
    config = DistillConfig(store=store, epochs=epochs, batch_size=8, device=where)
    result = in_a_new_process(_distill_in, folder, config)
    return Figure(
        what="data wait / training time of distill, TinyViT on the example photos",
        value=result["data_wait_share"],
        target=WAIT_TARGET,
        at_least=False,
        sides=f"{result['steps']} steps of up to {result['batch_size']} images at "
        f"{result['images_per_second']:.3g} images/s",
    )


def _distill_in(folder: Path, config: DistillConfig) -> dict[str, Any]:
    """Run distill in a folder, which gets its `runs/latest`."""
    os.chdir(folder)
    return distill(config)


if __name__ == "__main__":
    main()
