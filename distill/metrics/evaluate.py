"""Evaluation of a student on rows of a store: standalone, and as validation in training.

Shape suffixes: B images, C channels, H and W rows and columns of the image's canvas or of the embedding's grid,
2 (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...sam import normalize_and_pad
from ...sam.modeling.neck import input_side
from ...store import EmbeddingStore
from ..data.loader import Batch, Loader, default_workers
from ..data.rows import RecordsByRow
from ..data.sampler import split_batches
from ..distributed import ProcessGroup
from ..loss.base import Objective
from ..loss.coupled import MaskObjective
from ..run_folder import Run
from .embedding import ImageMetrics, Metrics, merge
from .masks import POINTS_PER_SIDE, MaskComparison

OnEmbeddings = Callable[[Sequence[int], Tensor, Tensor], None]
"""Callback for a batch: its rows, the student's embeddings and the teacher's, float32 (B, 256, g, g)."""


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Device and arithmetic of a student's forward passes, in training and in evaluation."""

    device: torch.device
    """Device of the student."""
    precision: str
    """"float32" or "bfloat16" (autocast); resolved, never "auto"."""
    batch_size: int
    """Images of one forward pass: the micro-batch in training."""
    memory_format: torch.memory_format = torch.channels_last
    """Layout of the student's weights and pixels. Channels last is 2.2 times faster in bfloat16, 1.1 to 1.2 times in
    float32 at two images (measured on CPUs)."""
    workers: int | None = None
    """Threads that decode images for `evaluate`; None: as many as the trainer's loader has by default."""


def embed(student: nn.Module, batch: Batch, compute: ComputeSettings) -> tuple[Tensor, Tensor]:
    """Compute the student's embeddings of a batch, and copy the teacher's to the same device.

    Copies from pinned memory are asynchronous. The caller decides whether gradients are recorded.

    Args:
        student: encoder on the device of `compute`, its weights in the memory format of `compute`.
        batch: batch of a loader, on the CPU.
        compute: device, precision and memory format.

    Returns:
        The student's and the teacher's embeddings, each float32 (B, 256, g, g) on the device.
    """
    device = compute.device
    canvas_BHWC = batch.canvas_BHWC.to(device, non_blocking=True)
    pixels_BCHW = normalize_and_pad(canvas_BHWC, batch.canvas_sizes_B2)
    pixels_BCHW = pixels_BCHW.contiguous(memory_format=compute.memory_format)
    teacher_BCHW = teacher_embeddings(batch, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=compute.precision == "bfloat16"):
        student_BCHW = student(pixels_BCHW)
    return student_BCHW.float(), teacher_BCHW


def teacher_embeddings(batch: Batch, device: torch.device) -> Tensor:
    """Copy the teacher's embeddings of a batch to a device.

    Args:
        batch: batch of a loader, on the CPU.
        device: device to copy to; copies from pinned memory are asynchronous.

    Returns:
        float32 (B, 256, g, g).
    """
    teacher_BCHW = batch.values_BCHW.to(device, non_blocking=True).float()
    if batch.scales_BC is not None:
        teacher_BCHW = teacher_BCHW * batch.scales_BC.to(device, non_blocking=True)[:, :, None, None]
    return teacher_BCHW


@torch.no_grad()
def evaluate_batches(
    student: nn.Module,
    batches: Iterable[Batch],
    compute: ComputeSettings,
    *,
    mean_embedding: Tensor | None,
    on_embeddings: OnEmbeddings | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Metrics:
    """Measure a student over batches. The student is set to evaluation mode and stays in it.

    Args:
        student: encoder on the device of `compute`.
        batches: batches of a loader.
        compute: device, precision and memory format.
        mean_embedding: float (256, g, g), the baseline of skill; None leaves skill undefined.
        on_embeddings: called for each batch with its embeddings on the device.
        on_batch: called after each batch with the number of images done so far.

    Returns:
        Metrics of all batches, on the device.
    """
    student.eval()
    metrics = Metrics(None if mean_embedding is None else mean_embedding.to(compute.device))
    for batch in batches:
        student_BCHW, teacher_BCHW = embed(student, batch, compute)
        metrics.update(student_BCHW, teacher_BCHW, batch.valid_BHW.to(compute.device, non_blocking=True))
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
    compute: ComputeSettings,
    *,
    mean_embedding: Tensor | None,
    on_embeddings: OnEmbeddings | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], list[ImageMetrics]]:
    """Measure a student against the stored embeddings of some rows.

    Args:
        student: encoder on the device of `compute`; its weights are converted to the memory format of `compute`.
        store: store of the teacher's embeddings, open for reading.
        rows: committed rows of the store.
        image_root: folder that the store's keys are relative to; None: the images that the store keeps.
        compute: device, precision, batch size, memory format, decoding threads.
        mean_embedding: float (256, g, g), the baseline of skill; None leaves skill undefined.
        on_embeddings: called for each batch with its embeddings on the device.
        on_image: called after each batch with the number of images done and the total.

    Returns:
        The metrics over all rows (`Metrics.result`), and those of each row in the order of `rows`.

    Raises:
        ImageError: an image is missing or not the one that was precomputed.
        StoreDamaged: a row's embedding is damaged.
        DistillError: an image doesn't decode as it did when it was precomputed.
    """
    student = student.to(memory_format=compute.memory_format)
    pin_memory = compute.device.type == "cuda"
    with (
        Loader(
            store,
            RecordsByRow(store),
            image_root,
            workers=compute.workers or default_workers(compute.device),
            pin_memory=pin_memory,
            student_size=input_side(student, store.spec.image_size),
        ) as loader,
        closing(loader.batches(split_batches(rows, compute.batch_size))) as batches,
    ):
        metrics = evaluate_batches(
            student,
            batches,
            compute,
            mean_embedding=mean_embedding,
            on_embeddings=on_embeddings,
            on_batch=None if on_image is None else lambda done: on_image(done, len(rows)),
        )
    return metrics.result(), metrics.per_image


class Validation:
    """Validation of a student in training, by all processes together.

    It computes the metrics of embeddings and, for an objective that compares masks, also mIoU, as `verify` does. Each
    process has its own instance and measures its share of the batches; all of them must call `measure`.

    Args:
        student: encoder on the device of `compute`.
        loader: loader of at least the validation rows.
        run: run with the mean embedding, the baseline of skill.
        objective: objective whose heads decode the masks, if it compares masks.
        compute: device, precision, batch size and memory format.
        processes: processes that share the work.
    """

    def __init__(
        self,
        student: nn.Module,
        loader: Loader,
        run: Run,
        objective: Objective,
        *,
        compute: ComputeSettings,
        processes: ProcessGroup,
    ) -> None:
        self.student, self.loader, self.run, self.objective = student, loader, run, objective
        self.compute, self.processes = compute, processes

    def measure(self, rows: Iterable[int], before_batch: Callable[[], None]) -> dict[str, Any]:
        """Measure the student over `rows`.

        Args:
            rows: rows for all processes together.
            before_batch: called before each batch, equally often in every process, so that it may use collectives. An
                exception that it raises ends the measurement.

        Returns:
            The metrics over all rows, the same in every process; with `miou`, `miou_min`, `prompts` and
            `empty_masks` if the objective compares masks.
        """
        self.processes.broadcast_buffers(self.student)
        batches = split_batches(list(rows), self.compute.batch_size)
        rounds = math.ceil(len(batches) / self.processes.world_size)
        masks = self._comparison()
        with closing(self.loader.batches(self.processes.share_of(batches))) as coming:
            measured = evaluate_batches(
                self.student,
                _in_rounds(coming, rounds, before_batch),
                self.compute,
                mean_embedding=self.run.mean_embedding(),
                on_embeddings=None if masks is None else masks.update,
            )
        merged = merge(self.processes.gather(measured.on_cpu()))
        numbers = merged.result() if self.processes.is_main else {}
        if masks is not None:
            numbers |= self._merged(masks)
        return self.processes.broadcast(numbers if self.processes.is_main else None)

    def score(self, metrics: dict[str, Any]) -> float:
        """Return the score by which epochs are compared; less is better.

        Args:
            metrics: result of `measure`.

        Returns:
            1 - mIoU for an objective that compares masks (1 if mIoU is undefined), else `mse_valid`.
        """
        if isinstance(self.objective, MaskObjective):
            return 1.0 if metrics["miou"] is None else 1 - float(metrics["miou"])
        return float(metrics["mse_valid"])

    def _comparison(self) -> MaskComparison | None:
        if not isinstance(self.objective, MaskObjective):
            return None
        return MaskComparison(
            self.objective.teacher_head, self.loader.records, POINTS_PER_SIDE, self.objective.head
        )

    def _merged(self, masks: MaskComparison) -> dict[str, Any]:
        """Return the merged comparison of all processes in rank 0, an empty dictionary in the others."""
        for ious, empty in self.processes.gather((masks.ious, masks.empty))[1:]:
            masks.merge(ious, empty)
        return masks.result() if self.processes.is_main else {}


def _in_rounds(batches: Iterator[Batch], rounds: int, before_batch: Callable[[], None]) -> Generator[Batch]:
    """Call `before_batch` `rounds` times, and yield the next batch, if there is one, after each call."""
    for _ in range(rounds):
        before_batch()
        yield from islice(batches, 1)
