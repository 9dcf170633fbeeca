"""What a student's batch norms do in training: whose statistics they use, and how they keep them."""

from __future__ import annotations

from torch import nn

BATCH_NORM_MOMENTUM = 0.1


class BatchNorms:
    """The batch norms of a student; none, for some."""

    def __init__(self, student: nn.Module) -> None:
        self._modules = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def prepare(self, micro_steps: int, *, frozen: bool) -> None:
        """For a forward pass in training, the `micro_steps`-th: statistics of the micro-batch at first, fixed ones
        where they are `frozen`.

        A micro-batch of two images normalises each by the other: noise that a student, which is judged with
        fixed statistics, needn't learn to bear. Wu and Johnson find fixed ones best for the end of training with
        small batches ("Rethinking Batch in BatchNorm", arXiv 2105.07576).
        """
        for module in self._modules:
            module.train(not frozen)
            module.momentum = batch_norm_momentum(micro_steps)


def batch_norm_momentum(micro_steps: int) -> float:
    """Plain averages over the first forward passes, moving ones after.

    With a constant momentum of 0.1 a short run would be judged with statistics that still hold much of their
    initial 0 and 1: 35% of it after ten forward passes.
    """
    return max(BATCH_NORM_MOMENTUM, 1 / micro_steps)
