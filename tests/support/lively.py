"""A SAM whose random weights give masks with edges, for tests that compare masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mobilesam.distill import build_student, save_student
from mobilesam.sam.modeling.head import SamHead

IMAGE_SIZE = 64


class ToyEncoder(nn.Module):
    """The least that is a student: one convolution of stride 16."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch = nn.Conv2d(3, 256, 16, stride=16)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.patch(pixels_BCHW)


def lively_head(image_size: int = IMAGE_SIZE, seed: int = 3) -> dict[str, Tensor]:
    """A head's state as torch initialises it, but for logits that lie far from zero on either side."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = SamHead(image_size).state_dict()
    for key, value in state.items():
        if "output_hypernetworks_mlps" in key and ".layers.2." in key:
            value.mul_(1000)
    return state


def save_lively(path: Path, name: str = "tiny_vit", image_size: int = IMAGE_SIZE, **info: object) -> Path:
    """A student's file with such a head; returns `path`."""
    known: Mapping[str, object] = info
    save_student(
        build_student(name, image_size, seed=3), path, name, image_size, known, lively_head(image_size)
    )
    return path
