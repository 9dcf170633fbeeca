"""A student judged on rows of a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..sam import normalize_and_pad
from ..store import EmbeddingStore
from .loader import Batch, Loader
from .metrics import ImageMetrics, Metrics
from .sampler import split_batches

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
        Loader(store, store.records(), image_root, workers=workers, pin_memory=pin_memory) as loader,
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
