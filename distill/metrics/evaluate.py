"""A student judged on rows of a store."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...sam import normalize_and_pad
from ...store import EmbeddingStore
from ..data.loader import Batch, Loader
from ..data.sampler import split_batches
from ..distributed import Replicas
from ..loss.base import Objective
from ..loss.objectives import MaskObjective
from ..run_folder import Run
from .embedding import ImageMetrics, Metrics, merge
from .masks import POINTS, MaskComparison

OnEmbeddings = Callable[[Sequence[int], Tensor, Tensor], None]
"""Is called with a batch's rows, the student's embeddings and the teacher's, float32 (B, 256, g, g)."""


def embed(
    student: nn.Module,
    batch: Batch,
    device: torch.device,
    precision: str,
    memory_format: torch.memory_format = torch.channels_last,
) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's embeddings of a batch on `device`, float32 (B, 256, g, g).

    Copies from pinned memory don't wait. Gradients are recorded as the caller has set it. `memory_format` is what the
    student's weights are in: channels_last is the faster one.
    """
    canvas_BHWC = batch.canvas_BHWC.to(device, non_blocking=True)
    pixels_BCHW = normalize_and_pad(canvas_BHWC, batch.sizes_B2)
    pixels_BCHW = pixels_BCHW.contiguous(memory_format=memory_format)
    teacher_BCHW = batch.values_BCHW.to(device, non_blocking=True).float()
    if batch.scales_BC is not None:
        teacher_BCHW = teacher_BCHW * batch.scales_BC.to(device, non_blocking=True)[:, :, None, None]
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        student_BCHW = student(pixels_BCHW)
    return student_BCHW.float(), teacher_BCHW


@torch.no_grad()
def evaluate_batches(
    student: nn.Module,
    batches: Iterable[Batch],
    *,
    mean_embedding: Tensor | None,
    device: torch.device,
    precision: str,
    memory_format: torch.memory_format = torch.channels_last,
    on_embeddings: OnEmbeddings | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Metrics:
    """Puts the student into evaluation mode, measures it over the batches, and leaves it in that mode.

    `on_embeddings` is called for each batch, on `device`, and after it `on_batch(images)` with the number of images
    so far.
    """
    student.eval()
    metrics = Metrics(None if mean_embedding is None else mean_embedding.to(device))
    for batch in batches:
        student_BCHW, teacher_BCHW = embed(student, batch, device, precision, memory_format)
        metrics.update(student_BCHW, teacher_BCHW, batch.valid_BHW.to(device, non_blocking=True))
        if on_embeddings is not None:
            on_embeddings(batch.rows, student_BCHW, teacher_BCHW)
        if on_batch is not None:
            on_batch(len(metrics.per_image))
    return metrics


def evaluate(
    student: nn.Module,
    store: EmbeddingStore,
    rows: Sequence[int],
    image_root: Path | None,
    *,
    mean_embedding: Tensor | None,
    device: torch.device | str,
    precision: str,
    batch_size: int,
    workers: int = 2,
    memory_format: torch.memory_format = torch.channels_last,
    on_embeddings: OnEmbeddings | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], list[ImageMetrics]]:
    """The metrics of `student`, which is on `device`, over `rows`, and each row's own in the same order.

    With None for `image_root` images are those that the store keeps. `precision` is "float32" or "bfloat16"
    (autocast). The student's weights are put into `memory_format`.
    `on_embeddings` is called for each batch, on `device`; `on_image(done, total)` counts images. Raises what
    Loader.batches raises.
    """
    device = torch.device(device)
    student = student.to(memory_format=memory_format)
    pin_memory = device.type == "cuda"
    with (
        Loader(store, store.manifest.records(), image_root, workers=workers, pin_memory=pin_memory) as loader,
        closing(loader.batches(split_batches(rows, batch_size))) as batches,
    ):
        metrics = evaluate_batches(
            student,
            batches,
            mean_embedding=mean_embedding,
            device=device,
            precision=precision,
            memory_format=memory_format,
            on_embeddings=on_embeddings,
            on_batch=None if on_image is None else lambda done: on_image(done, len(rows)),
        )
    return metrics.result(), metrics.per_image


# --- What a student is worth while it is trained: its metrics over the validation rows, by all processes together.


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
