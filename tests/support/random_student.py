"""Student with random weights whose masks have edges, for tests that compare masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mobilesam.distill import build_student, save_student
from mobilesam.sam.modeling.head import SamHead

IMAGE_SIZE = 64


class ToyEncoder(nn.Module):
    """Smallest possible student: one convolution of stride 16."""

    def __init__(self, image_size: int, _student_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch = nn.Conv2d(3, 256, 16, stride=16)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.patch(pixels_BCHW)


def random_head(image_size: int = IMAGE_SIZE, seed: int = 3) -> dict[str, Tensor]:
    """Return a head's initial state with its last mask layers scaled, so that logits are far from zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = SamHead(image_size).state_dict()
    for key, value in state.items():
        if "output_hypernetworks_mlps" in key and ".layers.2." in key:
            value.mul_(1000)
    return state


def save_random_student(
    path: Path, name: str = "tiny_vit", image_size: int = IMAGE_SIZE, **info: object
) -> Path:
    """Save a student with such a head and return `path`."""
    known: Mapping[str, object] = info
    save_student(
        build_student(name, image_size, seed=3), path, name, image_size, known, random_head(image_size)
    )
    return path
