"""Interface of a training objective: a loss, and the choice of the weights that it trains.

An objective gets a batch as micro-batches. The losses of a batch's micro-batches add up to the batch's loss, so the
micro-batch size affects only memory, what batch norms average over, and which prompts are drawn.

Shape suffixes: B images, C channels, H and W rows and columns of the embedding's grid (g x g), 2 (height, width).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from ...sam.modeling.head import SamHead
from ...store import EmbeddingStore
from ..config import DistillConfig
from ..data.loader import AnnotatedObjects, Batch

HEAD_LR_SHARE = 0.1
"""Share of the learning rate for a head that is trained: it starts as the teacher's, which was trained for long."""


@dataclass(frozen=True, kw_only=True)
class BatchTotals:
    """Denominators of a whole batch, by which the losses of its micro-batches are divided."""

    elements: int
    """Embedding values that the MSE averages over; see `loss_elements`."""
    images: int


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Embeddings of B images that go through the student together, on the device."""

    student_BCHW: Tensor
    """float32 (B, 256, g, g), with gradients where the encoder is trained."""
    teacher_BCHW: Tensor
    """float32 (B, 256, g, g)."""
    valid_BHW: Tensor
    """bool (B, g, g), cells whose centre is image."""
    sizes_B2: Tensor
    """int64 (B, 2) on the CPU: height and width in pixels of the image in the encoder's square."""
    generator: torch.Generator
    """Random numbers of this micro-batch alone, drawn on the CPU."""
    objects: AnnotatedObjects | None = None
    """Objects from annotations; None where no annotations are read."""


def make_micro_batch(
    batch: Batch, student_BCHW: Tensor, teacher_BCHW: Tensor, generator: torch.Generator
) -> MicroBatch:
    """Return a loader's batch as a micro-batch on the device of its embeddings.

    Args:
        batch: on the CPU; copies from pinned memory don't wait.
        student_BCHW: float32 (B, 256, g, g), with gradients where the encoder is trained.
        teacher_BCHW: float32 (B, 256, g, g), on the same device.
        generator: on the CPU; see `micro_batch_generator`.
    """
    device = teacher_BCHW.device
    return MicroBatch(
        student_BCHW=student_BCHW,
        teacher_BCHW=teacher_BCHW,
        valid_BHW=batch.valid_BHW.to(device, non_blocking=True),
        sizes_B2=batch.sizes_B2,
        generator=generator,
        objects=None if batch.objects is None else batch.objects.to(device),
    )


def micro_batch_generator(seed: int, epoch: int, row: int) -> torch.Generator:
    """Return the generator of the micro-batch whose first row is `row`.

    It depends on the three numbers alone, so a micro-batch gets the same prompts in whichever process and whenever
    it is computed, after a resume too.
    """
    words = np.random.SeedSequence([seed, epoch, row]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


class Objective(ABC):
    """Training objective; `head` is None unless it trains SAM's head, with the student or instead of it."""

    trains_encoder = True
    head: SamHead | None = None

    @classmethod
    @abstractmethod
    def from_config(cls, config: DistillConfig, store: EmbeddingStore, device: torch.device) -> Self:
        """Build the objective with its heads, if it has any, on `device`.

        Raises:
            DistillError, StoreDamaged: it needs the store's head, which is missing or can't be used.
        """

    @abstractmethod
    def loss(self, micro_batch: MicroBatch, totals: BatchTotals) -> Tensor:
        """Return the micro-batch's share of the batch's loss: a float32 scalar with gradients."""

    def trained(self, student: nn.Module) -> nn.Module:
        """Return the module that a checkpoint has to hold: the student, with the head if that is trained."""
        return student if self.head is None else nn.ModuleDict({"student": student, "head": self.head})
