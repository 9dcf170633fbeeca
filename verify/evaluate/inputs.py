"""Inputs of an evaluation: images, labels, the teacher, the models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...common.errors import VerifyError, counted
from ...distill import Run
from ...distill.data.loader import check_preprocessing, find_image_root
from ...sam import (
    AnnotationFiles,
    Annotations,
    CocoInstances,
    LabelMasks,
    LabelSource,
    NameMatch,
    exif_orientation,
)
from ...sam.device import resolve_device
from ...sam.registry import hq_note
from ...store import EmbeddingStore, ImageRecord
from ..inputs import no_masks, open_head
from ..thresholds import audit_faults
from .config import DEFAULT_IMAGE_SIZE, EvaluateConfig
from .images import FolderImages, Images, LazyImage, StoreImages
from .models import LoadedModel, ModelLoader
from .predictor import Predictor
from .sam_predictor import EncoderPredictor, StorePredictor

Progress = Callable[[int, int], None]
ListedLabels = CocoInstances | LabelMasks


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationInputs:
    """Images, models, and the references that masks are compared with."""

    images: Images
    labels: LabelSource | None
    """Source of labelled objects; None without labels."""
    match: NameMatch | None
    """Names in the source of labels against those of all images; None for files beside the images."""
    teacher: Predictor | None
    """Predictor of the teacher's masks; None without a teacher."""
    reference: dict[str, Any] | None
    """Name and sources of the teacher, as JSON values."""
    models: Sequence[LoadedModel]
    device: torch.device
    split: str
    """Rows of the store that are evaluated: "val" or "all"."""
    notes: list[str]
    """Warnings about how to read the numbers."""

    @property
    def predictors(self) -> list[Predictor]:
        """Predictors of the models."""
        return [model.predictor for model in self.models]

    @property
    def encoder_sizes(self) -> list[int]:
        """Sides in pixels to which images are resized for the encoders, the teacher's included."""
        predictors = [*self.predictors, *([self.teacher] if self.teacher else [])]
        return [each.student_size for each in predictors if isinstance(each, EncoderPredictor)]

    def read_labels(self, image: LazyImage) -> Annotations | None:
        """Return the labelled objects of an image; None if it has no labels. Raises AnnotationError."""
        if self.labels is None:
            return None
        # A store's kept images are upright and have no EXIF any more.
        turn = None if self.images.root is None else partial(exif_orientation, image.data)
        return self.labels.read(image.key, size=image.original_size, turn=turn)


def open_evaluation(
    config: EvaluateConfig, stack: ExitStack, download: Progress | None = None
) -> EvaluationInputs:
    """Open all inputs of an evaluation.

    Args:
        config: all options.
        stack: exit stack that closes the store.
        download: called with (bytes done, bytes in total) while a teacher's checkpoint is downloaded.

    Raises:
        VerifyError: an input can't be used.
        StoreError, DistillError, SamError: an input is missing or damaged.
    """
    device = resolve_device(config.device)
    listed = _listed_labels(config)
    if config.store is not None:
        return _open_store(config, stack.enter_context(EmbeddingStore.open(config.store)), device, listed)
    return _open_folder(config, device, listed, download)


def _open_folder(
    config: EvaluateConfig, device: torch.device, listed: ListedLabels | None, download: Progress | None
) -> EvaluationInputs:
    """Open the images of a folder or tar, and the teacher, if one is given."""
    assert config.images is not None, "checked by EvaluateConfig"
    images = FolderImages(config.images, config.limit)
    loader = ModelLoader(device=device, image_size=config.image_size or DEFAULT_IMAGE_SIZE, head=config.head)
    teacher, reference = None, None
    if config.teacher is not None:
        teacher = loader.load_teacher(config.teacher, config.teacher, config.checkpoint, download)
        known = teacher.to_json()
        reference = {
            "teacher": config.teacher,
            "store": None,
            "file": known["file"],
            "image_size": known["image_size"],
        }
    return EvaluationInputs(
        images=images,
        labels=_labels(listed, images),
        match=None if listed is None else listed.match(images.all_keys, images.root),
        teacher=None if teacher is None else teacher.predictor,
        reference=reference,
        models=[loader.load(name, value) for name, value in config.models],
        device=device,
        split="all",
        notes=[f"not read: {problem}" for problem in images.problems],
    )


def _open_store(
    config: EvaluateConfig, store: EmbeddingStore, device: torch.device, listed: ListedLabels | None
) -> EvaluationInputs:
    """Open the images of a store's rows, with the store's embeddings as the teacher."""
    size = store.spec.image_size
    check_preprocessing(store, refusal=VerifyError)
    with_head = config.store if config.head is None and store.spec.head_sha256 is not None else config.head
    loader = ModelLoader(device=device, image_size=config.image_size or size, head=with_head)
    models = [loader.load(name, value) for name, value in config.models]
    own_runs = [run for run in (model.run for model in models) if run is not None and _trained_on(run, store)]
    last = next((run.image_root for run in own_runs if run.image_root is not None), None)
    root = find_image_root(store, config.images, last, refusal=VerifyError)
    for model in models:
        if root is None and model.needs_photos:
            raise VerifyError(
                f"--model {model.name} takes whole photos, {config.store} keeps resized ones: say where the "
                "photos are with --images DIR"
            )
    records, split = _records(config, store, own_runs)
    images = StoreImages(store, records[: config.limit], root)
    reason = no_masks(store, config.head)
    teacher = None
    if config.points and reason is None:
        teacher = StorePredictor(store, open_head(store, device, config.head), device)
    return EvaluationInputs(
        images=images,
        labels=_labels(listed, images),
        match=None if listed is None else listed.match(images.all_keys, Path(store.spec.image_root)),
        teacher=teacher,
        reference={
            "teacher": store.spec.teacher,
            "store": str(config.store),
            "file": store.spec.checkpoint,
            "image_size": size,
        },
        models=models,
        device=device,
        split=split,
        notes=[
            *_notes(store, own_runs, models),
            *_missing_labels(listed, images),
            *_head_notes(store, config, reason),
        ],
    )


def _listed_labels(config: EvaluateConfig) -> ListedLabels | None:
    """Open the COCO file or the folder of masks, if one is given."""
    if config.coco is not None:
        return CocoInstances(config.coco)
    return None if config.label_masks is None else LabelMasks(config.label_masks)


def _labels(listed: ListedLabels | None, images: Images) -> LabelSource | None:
    if listed is not None:
        return listed
    return None if images.root is None else AnnotationFiles(images.root)


def _trained_on(run: Run, store: EmbeddingStore) -> bool:
    return run.description.data.store_id == store.spec.store_id


def _records(
    config: EvaluateConfig, store: EmbeddingStore, own_runs: Sequence[Run]
) -> tuple[Sequence[ImageRecord], str]:
    """Return the rows to evaluate, and the name of their split; `own_runs` are runs trained on the store."""
    records = store.manifest.records("done")
    if config.split == "val" and not own_runs:
        raise VerifyError(
            f"no model is a run that was trained on {store.path}, so nothing is held out there: give --split all"
        )
    if config.split == "all" or not own_runs:
        split = "all"
    else:
        split = "val"
        held_out = set.intersection(*(set(run.split.val) for run in own_runs))
        records = [record for record in records if record.row in held_out]
    if not records:
        counts = store.manifest.counts()
        raise VerifyError(
            f"{store.path} has no row to evaluate (split {split}; {counts.done} done, {counts.pending} pending, "
            f"{counts.failed} failed): run precompute to the end, or give --split all"
        )
    return records, split


def _notes(store: EmbeddingStore, own_runs: Sequence[Run], models: Sequence[LoadedModel]) -> list[str]:
    counts, notes = store.manifest.counts(), []
    if counts.pending or counts.failed:
        notes.append(f"the store lacks {counts.pending} pending and {counted(counts.failed, 'failed image')}")
    notes += audit_faults(store)
    ids = {run.id for run in own_runs}
    for model in models:
        store_id, run_id = model.trained_on
        if model.run is None and store_id == store.spec.store_id and run_id not in ids:
            notes.append(
                f"{model.name} was trained on this store and is given without its run: it may have been trained on "
                "images that it is evaluated on here"
            )
    return notes


def _head_notes(store: EmbeddingStore, config: EvaluateConfig, reason: str | None) -> list[str]:
    """Return a note about the masks that the store's embeddings give; `reason` says why there are none."""
    if not config.points:
        return []
    note = hq_note(store.spec.teacher) if config.head is None else None
    return (
        [f"nothing is compared with the teacher: {reason}"] if reason is not None else [note] if note else []
    )


def _missing_labels(listed: ListedLabels | None, images: Images) -> list[str]:
    if listed is not None or images.root is not None:
        return []
    return [
        "the images are read from the store, which has no labels: give the folder of photos and labels with "
        "--images DIR"
    ]
