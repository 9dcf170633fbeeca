"""Registry of students: encoders that replace the teacher's, by the names that `--student` takes.

To add one, write its network (or a function that builds it) and one entry in STUDENTS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

import torch
from torch import nn

from ...common.errors import DistillError
from ...sam.modeling.tiny_vit import TinyViT
from .backbones import build_deit_tiny, build_timm, check_timm_name

TIMM_PREFIX = "timm:"


@dataclass(frozen=True, kw_only=True)
class StudentInfo:
    """Entry of the registry."""

    name: str
    summary: str
    """One line for the table of students."""
    build: Callable[[int], nn.Module]
    """Takes the image size S in pixels and returns an encoder from normalised pixels (B, 3, S, S) to embeddings
    (B, 256, S/16, S/16), its weights drawn from torch's global generator. Raises DistillError if timm is needed and
    isn't installed, or if the backbone doesn't take images of that size."""
    training_bytes: Mapping[str, int] | None = None
    """Memory of activations in bytes for one training image at 1024 x 1024, by precision; it scales with the area.
    None: measured when needed (`measure_training_bytes`)."""


STUDENTS: Mapping[str, StudentInfo] = {
    info.name: info
    for info in (
        StudentInfo(
            name="tiny_vit",
            summary="TinyViT-5M with SAM's neck: MobileSAM's encoder, 5.7 M parameters",
            build=TinyViT,
            # Slope of the process's peak memory over the number of images, rounded up (measured on a CPU).
            training_bytes={"float32": 2_600_000_000, "bfloat16": 1_500_000_000},
        ),
        StudentInfo(
            name="tiny_vit_11m",
            summary="TinyViT-11M with SAM's neck",
            build=partial(TinyViT, variant="11m"),
        ),
        StudentInfo(
            name="tiny_vit_21m",
            summary="TinyViT-21M with SAM's neck",
            build=partial(TinyViT, variant="21m"),
        ),
        StudentInfo(
            name="deit_tiny",
            summary="DeiT-Tiny with SAM's neck: a plain ViT of patch 16, attention over the whole image (needs timm)",
            build=build_deit_tiny,
        ),
    )
}


def student_info(name: str) -> StudentInfo:
    """Return the registry's entry, or a new one for `timm:NAME`.

    A `timm:` name is looked up in timm's own list; nothing is downloaded.

    Raises:
        DistillError: there is no such student (the message lists them), or timm isn't installed.
    """
    if name.startswith(TIMM_PREFIX):
        backbone = name.removeprefix(TIMM_PREFIX)
        check_timm_name(backbone)
        return StudentInfo(
            name=name,
            summary=f"timm's {backbone} with SAM's neck on its maps of stride 16 and 32",
            build=partial(build_timm, backbone),
        )
    if name not in STUDENTS:
        close = get_close_matches(name, STUDENTS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise DistillError(
            f"unknown student {name[:80]!r}; {meant}there are: {', '.join(STUDENTS)}, and {TIMM_PREFIX}NAME for "
            "timm's backbones"
        )
    return STUDENTS[name]


def build_student(name: str, image_size: int, seed: int) -> nn.Module:
    """Build a student with random weights on the CPU; torch's global generator is restored afterwards.

    Args:
        name: name in the registry, or `timm:NAME`.
        image_size: side of the encoder's square in pixels, S.
        seed: seed of the weights.

    Returns:
        An encoder of normalised pixels (B, 3, S, S) to embeddings (B, 256, S/16, S/16).

    Raises:
        DistillError: see `student_info` and `StudentInfo.build`.
    """
    info = student_info(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return info.build(image_size)


def outline_student(info: StudentInfo, image_size: int) -> nn.Module:
    """Build a student on torch's meta device: names, shapes and dtypes of its weights, without their memory.

    Args:
        info: the student's registry entry.
        image_size: side of the encoder's square in pixels.

    Raises:
        DistillError: see `StudentInfo.build`.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return info.build(image_size)
