"""Speed of the teacher's encoder against segment_anything's, with the same weights, on the same photo.

    python -m benchmarks.teacher

prints images a second of segment_anything's ViT in float32 and of ours in float32 and bfloat16, measured in turn in
one process, and how close the embeddings are. Weights are random: the time doesn't depend on them. The process keeps
freed memory for all sides, as precompute's workers do (sam/allocator.py), which helps segment_anything most.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import click
import numpy as np
import torch
from segment_anything import sam_model_registry
from torch import Tensor, nn

from benchmarks.support.figures import EMULATED, Figure, by_turns, report
from benchmarks.support.pictures import photo_pixels
from benchmarks.support.profiler import shares
from mobilesam.sam.allocator import keep_freed_memory
from mobilesam.sam.device import cpu_accelerates_bfloat16
from mobilesam.sam.registry import TEACHERS

LOW_TARGETS = {"vit_b": 8.0, "vit_l": 8.0, "vit_h": 9.0}
EXACT_TARGET = 1.3


@click.command()
@click.option(
    "--teacher", "teachers", type=click.Choice(list(LOW_TARGETS)), multiple=True, default=("vit_b", "vit_h")
)
@click.option("--rounds", default=3, show_default=True, help="Timed calls; the median counts.")
@click.option("--emulated", is_flag=True, help="Measure bfloat16 also where the processor only emulates it.")
@click.option(
    "--profile", is_flag=True, help="Print shares of the time by kind of operator instead of speeds."
)
@click.option("--json", "as_json", is_flag=True)
@torch.no_grad()
def main(teachers: tuple[str, ...], rounds: int, emulated: bool, profile: bool, as_json: bool) -> None:
    """Print the speed of SAM's ViTs, ours against segment_anything's."""
    keep_freed_memory()
    figures, notes = [], []
    for teacher in teachers:
        sides = encoders(teacher, bfloat16=emulated or cpu_accelerates_bfloat16())
        if profile:
            notes += [line for name, call in sides.items() for line in shares(f"{teacher} {name}", call)]
            continue
        found, remarks = measure(teacher, sides, rounds)
        figures += found
        notes += remarks
    report(figures, notes, as_json=as_json)


def encoders(teacher: str, *, bfloat16: bool) -> dict[str, Callable[[], Tensor]]:
    """Return calls of the compared encoders, each with the same weights and photo at 1024 pixels."""
    pixels = photo_pixels("astronaut.jpg", 1024)
    theirs = spread(sam_model_registry[teacher]().image_encoder.eval())
    ours = TEACHERS[teacher].encoder.build(1024).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    sides = {"segment_anything": partial(theirs, pixels), "float32": partial(ours, pixels)}
    if bfloat16:
        sides["bfloat16"] = partial(copy.deepcopy(ours).hold_in_bfloat16(), pixels)
    return sides


def measure(
    teacher: str, sides: dict[str, Callable[[], Tensor]], rounds: int
) -> tuple[list[Figure], list[str]]:
    """Measure one teacher; return figures and notes."""
    seconds = by_turns(sides, rounds)
    base = seconds["segment_anything"]

    def figure(precision: str, target: float) -> Figure:
        what = f"{teacher}: ours {precision} / segment_anything float32"
        if precision not in seconds:
            return Figure(what=what, value=None, target=target, sides=EMULATED)
        rates = f"{1 / seconds[precision]:.4g} / {1 / base:.4g} images/s"
        return Figure(what=what, value=base / seconds[precision], target=target, sides=rates)

    expected = sides["segment_anything"]()
    notes = [
        f"{teacher} {name}: {nearness(call(), expected)}"
        for name, call in sides.items()
        if name != "segment_anything"
    ]
    return [figure("float32", EXACT_TARGET), figure("bfloat16", LOW_TARGETS[teacher])], notes


def spread(encoder: nn.Module) -> nn.Module:
    """Fill position embeddings with random numbers instead of zeros, so that the comparison covers them."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name or name == "pos_embed":
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return encoder


def nearness(found: Tensor, expected: Tensor) -> str:
    """Return the cosine and the largest difference of two embeddings, as text."""
    cosine = torch.cosine_similarity(found, expected, dim=1).mean()
    largest = (found - expected).abs().max() / np.ptp(expected.numpy())
    return f"cosine {cosine:.6f}, largest difference {largest:.1e} of the range"


if __name__ == "__main__":
    main()
