"""What a student is worth while it is trained: its metrics over the validation rows, by all processes together."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import nn

from .evaluation import evaluate_batches
from .loader import Batch, Loader
from .mask_comparison import POINTS, MaskComparison
from .mask_objectives import MaskObjective
from .metrics import merge
from .objective import Objective
from .replicas import Replicas
from .run import Run
from .sampler import split_batches


class Validation:
    """Measures embeddings, and for an objective that looks at masks these, too, as `verify` does.

    With `replicas`, each process has its own and measures its share; all of them are asked together.
    """

    def __init__(
        self,
        student: nn.Module,
        loader: Loader,
        run: Run,
        objective: Objective,
        *,
        replicas: Replicas,
        device: torch.device,
        precision: str,
        batch_size: int,
    ) -> None:
        self.student, self.loader, self.run, self.objective = student, loader, run, objective
        self.replicas, self.device, self.precision = replicas, device, precision
        self.batch_size = batch_size

    def measure(self, rows: Iterable[int], before_batch: Callable[[], None]) -> dict[str, Any]:
        """The metrics over `rows`, the same in every process; `miou` and what belongs to it where masks are compared.

        `before_batch` is called in every process before each of its batches, as often in one as in the others: it may
        exchange something with them. What it raises ends the measurement.
        """
        self.replicas.copy_buffers(self.student)
        batches = split_batches(list(rows), self.batch_size)
        rounds = math.ceil(len(batches) / self.replicas.count)
        masks = self._comparison()
        with closing(self.loader.batches(self.replicas.share_of(batches))) as coming:
            measured = evaluate_batches(
                self.student,
                _in_rounds(coming, rounds, before_batch),
                mean_embedding=self.run.mean_embedding(),
                device=self.device,
                precision=self.precision,
                on_embeddings=None if masks is None else masks.add,
            )
        merged = merge(self.replicas.gathered(measured.on_cpu()))
        numbers = merged.result() if self.replicas.first else {}
        if masks is not None:
            numbers |= self._merged(masks)
        return self.replicas.shared(numbers if self.replicas.first else None)

    def score(self, metrics: dict[str, Any]) -> float:
        """How far the student is from its goal: less is better. An undefined mIoU is the worst."""
        if isinstance(self.objective, MaskObjective):
            return 1.0 if metrics["miou"] is None else 1 - float(metrics["miou"])
        return float(metrics["mse_valid"])

    def _comparison(self) -> MaskComparison | None:
        if not isinstance(self.objective, MaskObjective):
            return None
        return MaskComparison(self.objective.teacher_head, self.loader.records, POINTS, self.objective.head)

    def _merged(self, masks: MaskComparison) -> dict[str, Any]:
        """What all processes found, in the first one."""
        for ious, empty in self.replicas.gathered((masks.ious, masks.empty))[1:]:
            masks.take(ious, empty)
        return masks.result() if self.replicas.first else {}


def _in_rounds(batches: Iterator[Batch], rounds: int, before_batch: Callable[[], None]) -> Generator[Batch]:
    """The batches, each after a call; as many calls where there are fewer of them."""
    for _ in range(rounds):
        before_batch()
        yield from islice(batches, 1)
