"""Interface of a training objective: a loss, and the choice of the weights that it trains.

An objective gets a batch as micro-batches. The losses of a batch's micro-batches add up to the batch's loss, so the
micro-batch size affects only memory, the images that batch norms average over, and the prompts drawn.

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


@dataclass(frozen=True, kw_only=True)
class BatchTotals:
    """Denominators of a whole batch, by which the losses of its micro-batches are divided."""

    elements: int
    """Embedding values that the MSE averages over; see `loss_elements`."""
    images: int
    """Number of images."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Embeddings of the B images of one forward pass, on the device."""

    student_BCHW: Tensor
    """float32 (B, 256, g, g), with gradients where the encoder is trained."""
    teacher_BCHW: Tensor
    """float32 (B, 256, g, g)."""
    valid_BHW: Tensor
    """bool (B, g, g), True for cells whose centre lies in the image, not in the padding."""
    sizes_B2: Tensor
    """int64 (B, 2) on the CPU: height and width in pixels of the image in the encoder's square."""
    generator: torch.Generator
    """Generator of this micro-batch alone, on the CPU; see `micro_batch_generator`."""
    objects: AnnotatedObjects | None = None
    """Objects from annotations; None where no annotations are read."""


def make_micro_batch(
    batch: Batch, student_BCHW: Tensor, teacher_BCHW: Tensor, generator: torch.Generator
) -> MicroBatch:
    """Return a loader's batch as a micro-batch on the device of its embeddings.

    Args:
        batch: batch of a loader, on the CPU; copies from pinned memory are asynchronous.
        student_BCHW: float32 (B, 256, g, g), with gradients where the encoder is trained.
        teacher_BCHW: float32 (B, 256, g, g), on the same device.
        generator: generator on the CPU; see `micro_batch_generator`.
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
    """Return the random number generator of a micro-batch.

    It depends only on the arguments, so a micro-batch gets the same prompts in every process and after a resume.

    Args:
        seed: seed of the run, 0 or more.
        epoch: number of the epoch, from 0.
        row: first row of the micro-batch.

    Returns:
        A generator on the CPU.
    """
    words = np.random.SeedSequence([seed, epoch, row]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


class Objective(ABC):
    """Training objective; `head` is None unless it trains SAM's head, with the student or instead of it."""

    trains_encoder = True
    """False if the encoder is frozen."""
    head: SamHead | None = None
    """SAM's head, if it is trained."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: DistillConfig, store: EmbeddingStore, device: torch.device) -> Self:
        """Build the objective with its heads, if it has any.

        Args:
            config: options of the run.
            store: store with SAM's head, which the objectives that compare masks need.
            device: device of the heads.

        Raises:
            DistillError, StoreDamaged: it needs the store's head, which is missing or can't be used.
        """

    @abstractmethod
    def loss(self, micro_batch: MicroBatch, totals: BatchTotals) -> Tensor:
        """Compute the micro-batch's share of the batch's loss.

        Args:
            micro_batch: embeddings, and objects from annotations where these are used.
            totals: denominators of the whole batch.

        Returns:
            A float32 scalar with gradients.
        """

    def trained(self, student: nn.Module) -> nn.Module:
        """Return the module that checkpoints save: the student, with the head if that is trained."""
        return student if self.head is None else nn.ModuleDict({"student": student, "head": self.head})
