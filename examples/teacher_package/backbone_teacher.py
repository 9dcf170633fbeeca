"""A teacher for mobilesam: any backbone of timm, and a projection to the 256 channels of SAM's embedding.

The weights are one safetensors file that `save` writes at the end of one's own training: the backbone's name in its
metadata, and the tensors `backbone.*` and `projection.*`. If SAM's prompt encoder and mask decoder were trained with
them, they are in the file under SAM's names, and the teacher has a mask head.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

HEAD = ("prompt_encoder.", "mask_decoder.")
CHANNELS = 256


class BackboneTeacher(nn.Module):
    """Image encoder: (B, 3, S, S) pixels, normalised as SAM's, to an embedding (B, 256, S/16, S/16).

    Args:
        name: name of the backbone in timm.
        head: SAM's prompt encoder and mask decoder for these embeddings; empty if there is none.
    """

    def __init__(self, name: str, head: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, features_only=True, pretrained=False)
        reductions = self.backbone.feature_info.reduction()
        # The coarsest of the maps that are at least as fine as SAM's grid; ImageNet's statistics are SAM's.
        self.level = max(
            (i for i, each in enumerate(reductions) if each <= 16), key=reductions.__getitem__, default=0
        )
        self.projection = nn.Conv2d(self.backbone.feature_info.channels()[self.level], CHANNELS, 1)
        self.head = dict(head or {})

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute the embedding."""
        grid = (pixels.shape[2] // 16, pixels.shape[3] // 16)
        features = self.backbone(pixels)[self.level]
        return functional.interpolate(self.projection(features), grid, mode="bilinear")

    def head_state(self) -> dict[str, Tensor] | None:
        """Return SAM's head by the names of SAM's checkpoints; None if there is none."""
        return self.head or None


def load(checkpoint: Path | None, device: str) -> BackboneTeacher:
    """Load the teacher: the function that the entry point names.

    Args:
        checkpoint: file that `save` wrote, as given with --checkpoint.
        device: "cpu", "cuda:0".
    """
    if checkpoint is None:
        raise ValueError("give the file of its weights with --checkpoint FILE.safetensors")
    with safe_open(checkpoint, framework="pt", device=device) as file:
        name = file.metadata()["backbone"]
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no dictionary
    head = {key: value for key, value in state.items() if key.startswith(HEAD)}
    with torch.device(device):
        teacher = BackboneTeacher(name, head)
    teacher.load_state_dict({key: value for key, value in state.items() if key not in head})
    return teacher


def save(teacher: BackboneTeacher, name: str, path: Path) -> None:
    """Write a teacher's weights, with its head if it has one.

    Args:
        teacher: the trained teacher.
        name: name of its backbone in timm.
        path: file to write, NAME.safetensors.
    """
    tensors = {**teacher.state_dict(), **teacher.head}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"backbone": name})
