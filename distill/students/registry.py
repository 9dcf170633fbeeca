"""Registry of students: encoders that replace the teacher's, by the names that `--student` takes.

To add one, write its network (or a function that builds it) and one entry in STUDENTS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

import torch
from torch import nn

from ...common.errors import DistillError
from ...sam.modeling.neck import input_side
from ...sam.modeling.tiny_vit import TinyViT
from ...sam.photos.preprocess import PATCH
from .backbones import build_deit_tiny, build_timm, check_timm_name

TIMM_PREFIX = "timm:"

SMALLEST_SHARE = 4
"""The image size is at most this many times the student's: its neck takes no map finer than stride 4."""


@dataclass(frozen=True, kw_only=True)
class StudentInfo:
    """Entry of the registry."""

    name: str
    summary: str
    """One line for the table of students."""
    build: Callable[[int, int], nn.Module]
    """Takes the sides of SAM's square, S, and of the student's input, s, in pixels (`check_student_size`). Returns an
    encoder from normalised pixels (B, 3, s, s) to embeddings (B, 256, S/16, S/16), its weights drawn from torch's
    global generator; for an s below S, with the attribute `student_size`. Raises DistillError if timm is needed and
    isn't installed, or if the backbone doesn't take images of that size."""
    training_bytes: Mapping[str, int] | None = None
    """Memory of activations in bytes for one training image at 1024 x 1024, by precision; it scales with the area.
    None: measured when needed (`measure_training_bytes`)."""


def _tiny_vit(variant: str, image_size: int, student_size: int) -> nn.Module:
    return TinyViT(image_size, variant, student_size)


STUDENTS: Mapping[str, StudentInfo] = {
    info.name: info
    for info in (
        StudentInfo(
            name="tiny_vit",
            summary="TinyViT-5M with SAM's neck: MobileSAM's encoder, 5.7 M parameters",
            build=partial(_tiny_vit, "5m"),
            # Slope of the process's peak memory over the number of images, rounded up (measured on a CPU).
            training_bytes={"float32": 2_600_000_000, "bfloat16": 1_500_000_000},
        ),
        StudentInfo(
            name="tiny_vit_11m",
            summary="TinyViT-11M with SAM's neck",
            build=partial(_tiny_vit, "11m"),
        ),
        StudentInfo(
            name="tiny_vit_21m",
            summary="TinyViT-21M with SAM's neck",
            build=partial(_tiny_vit, "21m"),
        ),
        StudentInfo(
            name="deit_tiny",
            summary="DeiT-Tiny with SAM's neck: a plain ViT of patch 16, attention over the whole image (needs timm)",
            build=build_deit_tiny,
        ),
        StudentInfo(
            name="repvit_m1_1",
            summary="RepViT-M1.1 with SAM's neck: EdgeSAM's encoder (needs timm)",
            build=partial(build_timm, "repvit_m1_1"),
        ),
        StudentInfo(
            name="efficientvit_b1",
            summary="EfficientViT-B1 with SAM's neck: linear attention (needs timm)",
            build=partial(build_timm, "efficientvit_b1"),
        ),
        StudentInfo(
            name="mobilenetv4_conv_medium",
            summary="MobileNetV4-Conv-M with SAM's neck: convolutions alone (needs timm)",
            build=partial(build_timm, "mobilenetv4_conv_medium"),
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
            summary=f"timm's {backbone} with SAM's neck on its maps of stride 16 and 32, finer ones of small inputs",
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


def build_student(name: str, image_size: int, seed: int, student_size: int | None = None) -> nn.Module:
    """Build a student with random weights on the CPU; torch's global generator is restored afterwards.

    Args:
        name: name in the registry, or `timm:NAME`.
        image_size: side of SAM's square in pixels, S.
        seed: seed of the weights.
        student_size: side of the student's input in pixels, s; None: S.

    Returns:
        An encoder of normalised pixels (B, 3, s, s) to embeddings (B, 256, S/16, S/16).

    Raises:
        DistillError: see `student_info`, `check_student_size` and `StudentInfo.build`.
    """
    info = student_info(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(info, image_size, student_size)


def outline_student(info: StudentInfo, image_size: int, student_size: int | None = None) -> nn.Module:
    """Build a student on torch's meta device: names, shapes and dtypes of its weights, without their memory.

    Args:
        info: the student's registry entry.
        image_size: side of SAM's square in pixels.
        student_size: side of the student's input in pixels; None: `image_size`.

    Raises:
        DistillError: see `check_student_size` and `StudentInfo.build`.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return _build(info, image_size, student_size)


def _build(info: StudentInfo, image_size: int, student_size: int | None) -> nn.Module:
    size = check_student_size(student_size, image_size)
    student = info.build(image_size, size)
    if input_side(student, image_size) != size:
        raise DistillError(f"{info.name} takes no inputs of another size than {image_size}, the image size")
    return student


def check_student_size(student_size: int | None, image_size: int) -> int:
    """Return the side of a student's input in pixels.

    Args:
        student_size: the side that was asked for; None: `image_size`.
        image_size: side of SAM's square in pixels.

    Raises:
        DistillError: a size isn't a positive multiple of 16, or the student's isn't a quarter of the image size to
            all of it.
    """
    if image_size < PATCH or image_size % PATCH:
        raise DistillError(f"image size must be a positive multiple of {PATCH}; it is {image_size}")
    size = image_size if student_size is None else student_size
    smallest = PATCH * math.ceil(image_size / SMALLEST_SHARE / PATCH)
    if size % PATCH or not smallest <= size <= image_size:
        raise DistillError(
            f"student size must be a multiple of {PATCH} from {smallest} to {image_size}, the image size; it is "
            f"{size}"
        )
    return size
