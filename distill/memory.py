"""The memory that training a student takes, measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor, nn

from ..sam.head import SamHead
from ..sam.neck import EMBEDDING_CHANNELS
from .mask_objectives import MaskOptions
from .mask_training import Objects, mask_side

if TYPE_CHECKING:
    from .students import StudentInfo

MEASURED_SIZE = 256

# What of the free memory the default micro-batch may fill: the rest is for weights, AdamW's moments (70 MB
# for TinyViT) and fragmentation.
MEMORY_SHARE = 0.8


def default_micro_batch(
    info: StudentInfo,
    batch_size: int,
    image_size: int,
    precision: str,
    device: torch.device,
    masks: MaskOptions | None = None,
) -> int:
    """Images in a forward pass: 2 on a CPU, or 1 where masks leave no memory for more; on a GPU as many as its free
    memory holds; at most `batch_size`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    elif masks is None:
        return min(2, batch_size)
    else:
        free, batch_size = psutil.virtual_memory().available, min(2, batch_size)
    known = info.training_bytes
    at_1024 = known[precision] if known else measure_training_bytes(info, image_size, precision, device)
    if masks is not None:
        at_1024 += measure_mask_bytes(masks, image_size)
    an_image = at_1024 * (image_size / 1024) ** 2
    return max(1, min(batch_size, int(MEMORY_SHARE * free / an_image)))


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


def measure_mask_bytes(options: MaskOptions, image_size: int) -> int:
    """Bytes that the masks of one training image take at 1024 x 1024 pixels beside the head, at least 1; measured and
    scaled as above, by twice the objects and once."""
    size = min(image_size, MEASURED_SIZE)
    with torch.random.fork_rng(devices=[]):
        head = SamHead(size)
    emb_1CHW = torch.zeros(1, EMBEDDING_CHANNELS, size // 16, size // 16, requires_grad=True)

    def look(count: int) -> None:
        side = mask_side(size)
        objects = Objects(
            masks_PMM=torch.ones(count, side, side, dtype=torch.bool),
            image_P=torch.zeros(count, dtype=torch.long),
            inside_BMM=torch.ones(1, side, side, dtype=torch.bool),
            weight_P=torch.ones(count),
        )
        options.training.loss(head, emb_1CHW, objects, torch.Generator().manual_seed(0))

    once, twice = (_kept_bytes(partial(look, count * options.objects)) for count in (1, 2))
    return max(1, round((twice - once) * (1024 / size) ** 2))


def _saved_bytes(
    student: nn.Module, images: int, size: int, precision: str, device: torch.device | str
) -> int:
    """What a student's forward pass keeps."""
    pixels_BCHW = torch.zeros(images, 3, size, size, device=device)

    def look() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            student(pixels_BCHW)

    return _kept_bytes(look)


def _kept_bytes(forward: Callable[[], None]) -> int:
    """Bytes of the storages, each counted once, that a forward pass keeps for the backward pass."""
    storages: dict[int, torch.UntypedStorage] = {}
    nothing = torch.empty(0)

    def keep(saved: Tensor) -> Tensor:
        # Held, so that no other storage gets its address.
        storage = saved.untyped_storage()
        storages[storage.data_ptr()] = storage
        return nothing

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        forward()
    return sum(storage.nbytes() for storage in storages.values())
