"""Everything that an evaluation needs, opened: images, labels, the teacher, the models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...common.errors import VerifyError
from ...distill import Run
from ...distill.data.image_root import check_preprocessing, image_root
from ...sam import AnnotationFiles, Annotations, CocoInstances
from ...sam.device import resolve_device
from ...store import EmbeddingStore, ImageRecord
from ..inputs import open_head
from ..thresholds import audit_faults
from .config import DEFAULT_IMAGE_SIZE, EvaluateConfig
from .images import FolderScenes, Scene, Scenes, StoreScenes
from .models import Opened, Opener
from .predictor import Contender
from .sam_predictor import SamContender, StoreContender

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Arena:
    """What is compared, where, and with what."""

    scenes: Scenes
    labels: AnnotationFiles | CocoInstances | None
    teacher: Contender | None
    reference: dict[str, Any] | None
    """What the teacher is, as JSON values."""
    models: Sequence[Opened]
    device: torch.device
    split: str
    notes: list[str]

    @property
    def embedding(self) -> list[SamContender]:
        """Those that embed resized images."""
        all_of_them = [opened.contender for opened in self.models] + ([self.teacher] if self.teacher else [])
        return [contender for contender in all_of_them if isinstance(contender, SamContender)]

    def labels_of(self, scene: Scene) -> Annotations | None:
        """The objects of an image; None where nothing is said of it. Raises AnnotationError."""
        return None if self.labels is None else self.labels.read(scene.key, size=scene.original_size)


def open_arena(config: EvaluateConfig, stack: ExitStack, download: Progress | None = None) -> Arena:
    """Opens what `config` names; what has to be closed goes on `stack`. The models come last, as they take longest.

    Raises VerifyError, and the other rooms' errors for what is missing or damaged.
    """
    device = resolve_device(config.device)
    coco = None if config.coco is None else CocoInstances(config.coco)
    if config.store is not None:
        return _of_store(config, config.store, stack, device, coco)
    assert config.images is not None, "the config has one of them"
    scenes = FolderScenes(config.images, config.limit)
    opener = Opener(device=device, image_size=config.image_size or DEFAULT_IMAGE_SIZE)
    teacher = None
    if config.teacher is not None:
        teacher = opener.teacher(config.teacher, config.teacher, config.checkpoint, download)
    return Arena(
        scenes=scenes,
        labels=_labels(coco, scenes),
        teacher=None if teacher is None else teacher.contender,
        reference=None if teacher is None else {"teacher": config.teacher, "store": None, **_known(teacher)},
        models=[opener.open(name, value) for name, value in config.models],
        device=device,
        split="all",
        notes=[f"not read: {problem}" for problem in scenes.problems],
    )


def _of_store(
    config: EvaluateConfig, path: Path, stack: ExitStack, device: torch.device, coco: CocoInstances | None
) -> Arena:
    store = stack.enter_context(EmbeddingStore.open(path))
    size = store.spec.image_size
    check_preprocessing(store, refusal=VerifyError)
    opener = Opener(device=device, image_size=config.image_size or size, store=path)
    models = [opener.open(name, value) for name, value in config.models]
    own = [run for run in (opened.run for opened in models) if run is not None and _is_of(run, store)]
    last = next((run.image_root for run in own if run.image_root is not None), None)
    root = image_root(store, config.images, last, refusal=VerifyError)
    for opened in models:
        if root is None and opened.needs_photos:
            raise VerifyError(
                f"--model {opened.contender.name} takes whole photos, {path} keeps resized ones: say where the "
                "photos are with --images DIR"
            )
    records, split = _records(config, store, own)
    scenes = StoreScenes(store, records[: config.limit], root)
    reference = {
        "teacher": store.spec.teacher,
        "store": str(path),
        "file": store.spec.checkpoint,
        "image_size": size,
    }
    return Arena(
        scenes=scenes,
        labels=_labels(coco, scenes),
        teacher=StoreContender(store, open_head(store, device), device) if config.points else None,
        reference=reference,
        models=models,
        device=device,
        split=split,
        notes=[*_notes(store, own, models), *_without_labels(coco, scenes)],
    )


def _known(teacher: Opened) -> dict[str, Any]:
    names = teacher.names()
    return {key: names[key] for key in ("file", "image_size")}


def _labels(coco: CocoInstances | None, scenes: Scenes) -> AnnotationFiles | CocoInstances | None:
    if coco is not None:
        coco.told_of(scenes.key(index) for index in range(len(scenes)))
        return coco
    return None if scenes.root is None else AnnotationFiles(scenes.root)


def _is_of(run: Run, store: EmbeddingStore) -> bool:
    """Whether a run was trained on this store."""
    return run.description.data.store_id == store.spec.store_id


def _records(
    config: EvaluateConfig, store: EmbeddingStore, own: Sequence[Run]
) -> tuple[Sequence[ImageRecord], str]:
    """The rows to look at, and which split they are; `own` are the runs that were trained on the store."""
    records = store.manifest.records("done")
    if config.split == "val" and not own:
        raise VerifyError(
            f"no model is a run that was trained on {store.path}, so nothing is held out there: give --split all"
        )
    if config.split == "all" or not own:
        split = "all"
    else:
        split = "val"
        held_out = set.intersection(*(set(run.split.val) for run in own))
        records = [record for record in records if record.row in held_out]
    if not records:
        counts = store.manifest.counts()
        raise VerifyError(
            f"{store.path} has no row to look at (split {split}; {counts.done} done, {counts.pending} pending, "
            f"{counts.failed} failed): run precompute to the end, or give --split all"
        )
    return records, split


def _notes(store: EmbeddingStore, own: Sequence[Run], models: Sequence[Opened]) -> list[str]:
    counts, notes = store.manifest.counts(), []
    if counts.pending or counts.failed:
        notes.append(f"the store lacks {counts.pending} pending and {counts.failed} failed images")
    notes += audit_faults(store)
    ids = {run.id for run in own}
    for opened in models:
        if opened.run is None and opened.store_id == store.spec.store_id and opened.run_id not in ids:
            notes.append(
                f"{opened.contender.name} was trained on this store and comes without its run: it may have learned "
                "from images that it is judged by here"
            )
    return notes


def _without_labels(coco: CocoInstances | None, scenes: Scenes) -> list[str]:
    if coco is not None or scenes.root is not None:
        return []
    return [
        "the store keeps its images, so no labels were looked for: --images DIR says where photos lie beside some"
    ]
