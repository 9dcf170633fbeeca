"""Speed of the teacher's encoder against segment_anything's, with the same weights, on the same photo.

    python -m benchmarks.teacher

prints images a second of segment_anything's ViT in float32 and of ours in float32 and bfloat16, measured in turn in
one process, and how close the embeddings are. Weights are random: the time doesn't depend on them. The process keeps
freed memory for all sides, as precompute's workers do (sam/allocator.py), which helps segment_anything most. On a GPU
a batch has eight images, and times are the GPU's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import click
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from benchmarks.support.figures import EMULATED, Figure, by_turns, report, seconds_each
from benchmarks.support.pictures import photo_pixels
from benchmarks.support.profiler import shares
from mobilesam.sam.allocator import keep_freed_memory
from mobilesam.sam.device import accelerates_bfloat16, resolve_device
from mobilesam.sam.modeling.vit import ViTConfig
from mobilesam.sam.registry import TEACHERS

BATCHES = {"cpu": 1, "cuda": 8}
"""Images of a batch by type of device."""

LOW_TARGETS = {"vit_b": 8.0, "vit_l": 8.0, "vit_h": 9.0}
EXACT_TARGET = 1.3


@click.command()
@click.option(
    "--teacher", "teachers", type=click.Choice(list(LOW_TARGETS)), multiple=True, default=("vit_b", "vit_h")
)
@click.option("--rounds", default=3, show_default=True, help="Timed calls; the median counts.")
@click.option("--device", default="auto", show_default=True)
@click.option("--emulated", is_flag=True, help="Measure bfloat16 also where the processor only emulates it.")
@click.option(
    "--profile", is_flag=True, help="Print shares of the time by kind of operator instead of speeds."
)
@click.option("--json", "as_json", is_flag=True)
@torch.no_grad()
def main(
    teachers: tuple[str, ...], rounds: int, device: str, emulated: bool, profile: bool, as_json: bool
) -> None:
    """Print the speed of SAM's ViTs, ours against segment_anything's."""
    where = resolve_device(device)
    if where.type == "cpu":
        keep_freed_memory()
    figures, notes = [], []
    for teacher in teachers:
        bfloat16 = emulated or accelerates_bfloat16(where)
        sides = encoders(teacher, where, BATCHES[where.type], 1024, bfloat16=bfloat16)
        if profile:
            notes += [line for name, call in sides.items() for line in shares(f"{teacher} {name}", call)]
            continue
        found, remarks = measure(teacher, sides, rounds, where)
        figures += found
        notes += remarks
    report(figures, notes, as_json=as_json)


@torch.no_grad()
def encoders(
    teacher: str, device: torch.device, batch: int, image_size: int, *, bfloat16: bool
) -> dict[str, Callable[[], Tensor]]:
    """Return calls of the compared encoders, each with the same weights and photo.

    Args:
        teacher: vit_b, vit_l or vit_h.
        device: device to compute on.
        batch: number of times that the photo is in the batch.
        image_size: side of the encoders' square in pixels.
        bfloat16: add ours in bfloat16.
    """
    pixels = photo_pixels("astronaut.jpg", image_size).repeat(batch, 1, 1, 1).to(device)
    theirs = spread(peer_encoder(teacher, image_size).eval()).to(device)
    ours = TEACHERS[teacher].encoder.build(image_size).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    sides = {"segment_anything": partial(theirs, pixels), "float32": partial(ours, pixels)}
    if bfloat16:
        sides["bfloat16"] = partial(copy.deepcopy(ours).hold_in_bfloat16(), pixels)
    return sides


def peer_encoder(teacher: str, image_size: int) -> ImageEncoderViT:
    """Build segment_anything's encoder, whose own builders know only 1024 pixels."""
    config = TEACHERS[teacher].encoder
    assert isinstance(config, ViTConfig)
    return ImageEncoderViT(
        img_size=image_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        global_attn_indexes=config.global_blocks,
        window_size=14,
        out_chans=256,
    )


def measure(
    teacher: str, sides: dict[str, Callable[[], Tensor]], rounds: int, device: torch.device
) -> tuple[list[Figure], list[str]]:
    """Measure one teacher; return figures and notes."""
    batch = BATCHES[device.type]
    if device.type == "cpu":
        seconds = by_turns(sides, rounds)
    else:
        for call in sides.values():
            call()
        seconds = {name: seconds_each(call, device, rounds) / batch for name, call in sides.items()}
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
    largest = (found - expected).abs().max() / (expected.max() - expected.min())
    return f"cosine {cosine:.6f}, largest difference {largest:.1e} of the range"


if __name__ == "__main__":
    main()
