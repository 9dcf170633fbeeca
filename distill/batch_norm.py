"""Batch norms of a student in training: source of their statistics, and momentum."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from ..common.errors import counted
from ..sam.modeling.neck import input_side
from .students.registry import outline_student, student_info

logger = logging.getLogger(__name__)

MOMENTUM = 0.1
"""Momentum of all batch norms: that of the running statistics after the first passes."""

_BatchNorm = nn.modules.batchnorm._BatchNorm


class BatchNorms:
    """Control of a student's batch norms in training.

    A batch norm after a pooling over the whole image sees one value of each channel in an image. In a micro-batch of
    one image, as the odd last one of an epoch, it would subtract the value from itself, which torch refuses. There
    such norms use their running statistics, and don't update them.

    Args:
        student: encoder, with or without batch norms.
        name: its name in the registry.
        image_size: side of SAM's square in pixels.
        micro_batch: images of a full micro-batch.
    """

    def __init__(self, student: nn.Module, name: str, image_size: int, micro_batch: int) -> None:
        self._modules = {path: m for path, m in student.named_modules() if isinstance(m, _BatchNorm)}
        self._name, self._image_size, self._micro_batch = name, image_size, micro_batch
        self._student_size = input_side(student, image_size)
        self._before: dict[str, Tensor] = {}
        self._share = 1.0
        for module in self._modules.values():
            module.momentum = MOMENTUM

    def prepare(self, micro_steps: int, *, frozen: bool, images: int) -> None:
        """Set the batch norms up for a forward pass in training.

        In a micro-batch of two images, the statistics of each depend on the other: noise that is absent in
        evaluation, where statistics are fixed. Wu and Johnson find fixed statistics best for the end of training with
        small batches ("Rethinking Batch in BatchNorm", arXiv 2105.07576).

        Args:
            micro_steps: number of the forward pass, from 1.
            frozen: True normalises with the running statistics and doesn't update them; False uses those of the
                micro-batch.
            images: images of the micro-batch.
        """
        single = self._single if images == 1 and not frozen and self._modules else frozenset()
        for path, module in self._modules.items():
            module.train(not frozen and path not in single)
        self._share = momentum(micro_steps) / MOMENTUM
        constant = frozen or self._share == 1
        self._before = {} if constant else {key: value.clone() for key, value in self._statistics()}

    @torch.no_grad()
    def settle(self) -> None:
        """Give the running statistics the momentum of the forward pass that was prepared, after its backward pass.

        The modules' own momentum is constant, since a compiler makes another version of the student for each value.
        """
        for key, now in self._statistics() if self._before else ():
            before = self._before[key]
            now.copy_(before + self._share * (now - before))
        self._before = {}

    def _statistics(self) -> Iterator[tuple[str, Tensor]]:
        """Generate names and tensors of all running means and variances."""
        for path, module in self._modules.items():
            for name in ("running_mean", "running_var"):
                value = getattr(module, name)
                if value is not None:
                    yield f"{path}.{name}", value

    @cached_property
    def _single(self) -> frozenset[str]:
        """Paths of the norms that see one value of each channel in an image."""
        single = single_value_norms(self._name, self._image_size, self._student_size)
        if single and self._micro_batch == 1:
            logger.warning(
                "%s has %s over one value per image; in micro-batches of one image they keep their first statistics: "
                "--batch-size 2 with --micro-batch 2 trains them",
                self._name,
                counted(len(single), "batch norm"),
            )
        return single


def single_value_norms(name: str, image_size: int, student_size: int | None = None) -> frozenset[str]:
    """Return the module paths of a student's batch norms that see one value of each channel in an image.

    They are found by a forward pass on torch's meta device, which computes shapes alone.

    Args:
        name: name of the student in the registry, or `timm:NAME`.
        image_size: side of SAM's square in pixels.
        student_size: side of the student's input in pixels; None: `image_size`.
    """
    side = student_size or image_size
    student = outline_student(student_info(name), image_size, side).eval()
    single: set[str] = set()

    def hook(path: str, given: Tensor) -> None:
        if given[0, 0].numel() == 1:
            single.add(path)

    for path, module in student.named_modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(lambda _, inputs, path=path: hook(path, inputs[0]))
    with torch.no_grad():
        student(torch.empty(1, 3, side, side, device="meta"))
    return frozenset(single)


def momentum(micro_steps: int) -> float:
    """Return the momentum max(0.1, 1 / micro_steps): plain means at first, moving averages later.

    With a constant momentum of 0.1 the statistics of a short run would still hold much of their initial 0 and 1: 35%
    after ten forward passes.

    Args:
        micro_steps: number of the forward pass, from 1.
    """
    return max(MOMENTUM, 1 / micro_steps)
