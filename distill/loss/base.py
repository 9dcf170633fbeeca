"""What a student is taught by: a loss, and which weights it trains.

An objective gets a batch in parts, its micro-batches. Its losses of them add up to the batch's loss, so that the size
of a micro-batch decides nothing but memory, what batch norms average over, and which prompts are drawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...sam.modeling.head import SamHead
from ..data.loader import Batch, LabelledObjects

HEAD_LR_SHARE = 0.1
"""Of the learning rate, for a head that is trained: it begins as the teacher's, which was trained long."""


@dataclass(frozen=True, kw_only=True)
class WholeBatch:
    """What the losses of a batch's parts are averaged over: values of embeddings, and images."""

    elements: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """A micro-batch on the device: B images, g the embedding's grid.

    student_BCHW, teacher_BCHW: float32 (B, 256, g, g), the first with gradients where the encoder is trained.
    valid_BHW: bool (B, g, g), cells whose centre is image.
    sizes_B2: int64 (B, 2) on the CPU, height and width of the image in the encoder's square.
    objects: those of annotations, on the device, or None where none are read.
    generator: on the CPU, of this part's own random numbers.
    """

    student_BCHW: Tensor
    teacher_BCHW: Tensor
    valid_BHW: Tensor
    sizes_B2: Tensor
    generator: torch.Generator
    objects: LabelledObjects | None = None


def part_of(batch: Batch, student_BCHW: Tensor, teacher_BCHW: Tensor, generator: torch.Generator) -> Part:
    """A loader's batch whose embeddings are on the device, with the rest of it there, too."""
    device = teacher_BCHW.device
    return Part(
        student_BCHW=student_BCHW,
        teacher_BCHW=teacher_BCHW,
        valid_BHW=batch.valid_BHW.to(device, non_blocking=True),
        sizes_B2=batch.sizes_B2,
        generator=generator,
        objects=None if batch.objects is None else batch.objects.to(device),
    )


def part_generator(seed: int, epoch: int, row: int) -> torch.Generator:
    """The random numbers of the micro-batch that begins with `row`: the same whoever computes it, and when."""
    words = np.random.SeedSequence([seed, epoch, row]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


class Objective(ABC):
    """A way to teach. `head` is the one that is trained with the student, or instead of it; None where none is."""

    trains_encoder = True
    head: SamHead | None = None

    @abstractmethod
    def loss(self, part: Part, whole: WholeBatch) -> Tensor:
        """The part's share of the batch's loss, a float32 scalar with gradients."""

    def trained(self, student: nn.Module) -> nn.Module:
        """What a checkpoint has to hold: the student, and the head where one is trained."""
        return student if self.head is None else nn.ModuleDict({"student": student, "head": self.head})


# --- The decoupled objective: mean squared error against the stored embedding (MobileSAM, section 3.2).


def loss_elements(valid_BHW: Tensor, channels: int, region: str) -> int:
    """The number of embedding values that the loss of these images averages over.

    `valid_BHW` is bool: True where a grid cell's centre is image. With region "all" every cell counts (the
    paper), with "valid" only those cells.
    """
    cells = valid_BHW.numel() if region == "all" else int(valid_BHW.sum())
    return cells * channels


def decoupled_loss(
    student_BCHW: Tensor, teacher_BCHW: Tensor, valid_BHW: Tensor, elements: int, region: str
) -> Tensor:
    """Sum of squared errors over the region, divided by `elements`; a float32 scalar that carries gradients.

    `elements` is loss_elements() of the WHOLE batch, so that the losses of its micro-batches, whatever their
    lengths, add up to the loss of the batch, and so do their gradients.
    """
    error_BCHW = student_BCHW.float() - teacher_BCHW.float()
    if region == "valid":
        # Before squaring, and not by a product: a cell that doesn't count must not leak NaN into the gradient.
        error_BCHW = torch.where(valid_BHW[:, None], error_BCHW, error_BCHW.new_zeros(()))
    return error_BCHW.square().sum() / elements


class Decoupled(Objective):
    """No decoder in the loop: the student's embedding has to be the teacher's."""

    def __init__(self, region: str) -> None:
        super().__init__()
        self.region = region

    def loss(self, part: Part, whole: WholeBatch) -> Tensor:
        elements = whole.elements
        return decoupled_loss(part.student_BCHW, part.teacher_BCHW, part.valid_BHW, elements, self.region)
