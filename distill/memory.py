"""The memory that training a student takes, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .students import StudentInfo

MEASURED_SIZE = 256


def measure_training_bytes(
    info: StudentInfo, image_size: int, precision: str, device: torch.device | str = "cpu"
) -> int:
    """Bytes that one training image takes at 1024 x 1024 pixels beside the weights, at least 1.

    What autograd keeps for the backward pass, by two and by three images of at most 256 x 256 pixels: the
    difference is without weights and their casts. It is scaled by the area. For tiny_vit this gives what the
    process's peak memory does, within 10%.
    """
    size = min(image_size, MEASURED_SIZE)
    with torch.random.fork_rng():
        student = info.build(size).to(device).train()
        two, three = (_saved_bytes(student, count, size, precision, device) for count in (2, 3))
    return max(1, round((three - two) * (1024 / size) ** 2))


def _saved_bytes(
    student: nn.Module, images: int, size: int, precision: str, device: torch.device | str
) -> int:
    """Bytes of the storages, each counted once, that a forward pass keeps for the backward pass."""
    storages: dict[int, torch.UntypedStorage] = {}
    nothing = torch.empty(0)

    def keep(saved: Tensor) -> Tensor:
        # Held, so that no other storage gets its address.
        storage = saved.untyped_storage()
        storages[storage.data_ptr()] = storage
        return nothing

    pixels_BCHW = torch.zeros(images, 3, size, size, device=device)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved),
        torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        student(pixels_BCHW)
    return sum(storage.nbytes() for storage in storages.values())
