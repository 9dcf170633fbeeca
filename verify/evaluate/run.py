"""One evaluation: any number of models, their masks against the teacher's and against labels, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.errors import shown
from ...sam import AnnotationError, Annotations, CocoInstances, ImageError
from ..report import check_report, keeping
from . import iou
from .config import EvaluateConfig
from .images import Scene
from .inputs import Arena, open_arena
from .iou import Tally
from .predictor import Answer, Contender
from .prompts import Prompts, centre_of_mask, choose_objects, pair_prompts, point_prompts
from .report import write_evaluation_report
from .sam_predictor import prompts_at_once

OnImage = Callable[[int, int], None]
Judge = Callable[[Answer, Tensor], float]


def evaluate_masks(
    config: EvaluateConfig, *, progress: OnImage | None = None, download: OnImage | None = None
) -> dict[str, Any]:
    """Compares models and returns what `--json` prints.

    `images` counts all, `evaluated` those that gave numbers, `failed` lists {key, reason} of those that couldn't be
    read or whose labels are broken. `reference` is the teacher (None without), `left_out` how many pairs of points
    didn't fit into their images, by protocol. `models` has for each its names, its cost, and

    - `teacher`: protocol -> {miou, prompts, images}: IoU with the teacher's mask for the same prompt, SAM's single
      mask both times, at the image's original resolution; mean over an image's prompts, then over images.
    - `labels`: the same for boxes and centres of labelled objects, mean over all objects.

    `per_image` are each image's figures for `point` (else `center`), by model. `progress(done, total)` counts images,
    `download(done, total)` bytes of a teacher's checkpoint.

    Raises ReportError, which has the result, when only the report can't be made; VerifyError, and the other rooms'
    errors, for a model or store that is missing or damaged.
    """
    if config.report is not None:
        check_report(config.report)
    with ExitStack() as stack:
        arena = open_arena(config, stack, download)
        evaluation = _Evaluation(arena=arena, config=config)
        for index in range(len(arena.scenes)):
            evaluation.add(index)
            if progress is not None:
                progress(index + 1, len(arena.scenes))
        result = evaluation.result()
        if config.report is not None:
            with keeping(result, result):
                write_evaluation_report(config.report, result, arena, config)
    return result


@dataclass(kw_only=True, eq=False)
class _Evaluation:
    """What has been found so far."""

    arena: Arena
    config: EvaluateConfig
    failed: list[dict[str, str]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    per_image: list[dict[str, Any]] = field(default_factory=list)
    evaluated: int = 0
    labelled: int = 0
    listed: int = 0
    """Images that labels say anything of, were it that they show no object."""
    tallies: dict[str, Tally] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tallies = {opened.contender.name: Tally() for opened in self.arena.models}
        if self.arena.teacher is not None and self.config.points:
            self.left_out = {iou.pair_name(distance): 0 for distance in self.config.distances}

    @property
    def contenders(self) -> list[Contender]:
        return [opened.contender for opened in self.arena.models]

    def add(self, index: int) -> None:
        """One image. What is wrong with it is noted before any model sees it."""
        key = self.arena.scenes.key(index)
        try:
            scene = self.arena.scenes.read(index)
            labels = self.arena.labels_of(scene)
            for contender in self.arena.embedding:
                scene.resized(contender.image_size)
        except (ImageError, AnnotationError) as error:
            self.failed.append({"key": shown(key), "reason": shown(" ".join(str(error).split()))})
            return
        self.listed += labels is not None
        compares = self.arena.teacher is not None and self.config.points > 0
        if not compares and not labels:
            return
        finite = {contender.name: contender.look(scene) for contender in self.contenders}
        found: dict[str, dict[str, list[float]]] = {contender.name: {} for contender in self.contenders}
        if self.arena.teacher is not None and compares:
            self._against_teacher(self.arena.teacher, scene, found)
        if labels:
            self._against_labels(labels, scene, found)
            self.labelled += 1
        self.evaluated += 1
        self._take(scene, found, finite)

    def _against_teacher(
        self, teacher: Contender, scene: Scene, found: dict[str, dict[str, list[float]]]
    ) -> None:
        side, size = self.config.points, scene.original_size
        sets = {iou.POINT: point_prompts(side, size)}
        for distance in self.config.distances:
            name = iou.pair_name(distance)
            sets[name], missing = pair_prompts(side, size, distance, self.config.seed, scene.key)
            self.left_out[name] += missing
        finite = teacher.look(scene)
        for name, prompts in sets.items():
            for _, part in prompts.parts(prompts_at_once(size, self.arena.device)):
                wanted = [answer.masks_CHW[0] for answer in teacher.answer(part, False)]
                self._judge(part, wanted, False, {name: iou.first_iou}, found, undefined=not finite)

    def _against_labels(
        self, labels: Annotations, scene: Scene, found: dict[str, dict[str, list[float]]]
    ) -> None:
        chosen = choose_objects(len(labels), self.config.max_objects, self.config.seed, scene.key)
        at_once = prompts_at_once(scene.original_size, self.arena.device)
        for start in range(0, len(chosen), at_once):
            some = chosen[start : start + at_once]
            masks = [labels.mask(index) for index in some]
            wanted = [torch.from_numpy(mask_HW.copy()) for mask_HW in masks]
            centres = Prompts.of_points(np.array([centre_of_mask(mask_HW) for mask_HW in masks]))
            self._judge(
                Prompts(boxes_N4=labels.boxes_N4[some]), wanted, False, {iou.BOX: iou.first_iou}, found
            )
            self._judge(centres, wanted, False, {iou.CENTRE: iou.first_iou}, found)
            both = {iou.PICKED: iou.picked_iou, iou.ORACLE: iou.best_iou}
            self._judge(centres, wanted, True, both, found)

    def _judge(
        self,
        prompts: Prompts,
        wanted: Sequence[Tensor],
        several: bool,
        judges: Mapping[str, Judge],
        found: dict[str, dict[str, list[float]]],
        *,
        undefined: bool = False,
    ) -> None:
        """Every model's answers to the prompts, by each of the judges."""
        for contender in self.contenders:
            if several and not contender.several:
                continue
            answers = contender.answer(prompts, several)
            for name, judge in judges.items():
                ious = [judge(answer, mask_HW) for answer, mask_HW in zip(answers, wanted, strict=True)]
                found[contender.name].setdefault(name, []).extend(
                    [float("nan")] * len(ious) if undefined else ious
                )

    def _take(
        self, scene: Scene, found: Mapping[str, Mapping[str, list[float]]], finite: Mapping[str, bool]
    ) -> None:
        figures: dict[str, float | None] = {}
        for name, ious in found.items():
            for protocol, ious_N in ious.items():
                # Masks of an embedding that isn't finite are empty, and empty masks agree.
                self.tallies[name].add(protocol, ious_N if finite[name] else [float("nan")] * len(ious_N))
            shown_N = ious.get(iou.POINT) or ious.get(iou.CENTRE) or []
            mean = float(np.mean(shown_N)) if shown_N and finite[name] else float("nan")
            figures[name] = None if np.isnan(mean) else mean
        self.per_image.append({"key": scene.key, "miou": figures})

    def _label_notes(self) -> list[str]:
        """Why there are no labels where some were given."""
        coco, scenes = self.arena.labels, self.arena.scenes
        if not isinstance(coco, CocoInstances) or self.listed or self.failed or not len(scenes):
            return []
        example = coco.example()
        has = "is empty" if example is None else f"has {shown(example)!r} for instance"
        return [
            f"{coco.path.name} names none of the {len(scenes):,} images: it {has}, they are {shown(scenes.key(0))!r} "
            "for instance"
        ]

    def result(self) -> dict[str, Any]:
        """What `evaluate_masks` returns."""
        arena, config = self.arena, self.config
        protocols = (iou.POINT, *self.left_out) if self.left_out or (arena.teacher and config.points) else ()
        models = []
        for opened in arena.models:
            tally_of = self.tallies[opened.contender.name]
            models.append(
                {
                    **opened.names(),
                    **(vars(opened.contender.cost()) if self.evaluated else {}),
                    "teacher": {name: tally_of.by_image(name) for name in protocols},
                    "labels": {name: tally_of.by_object(name) for name in iou.LABEL_PROTOCOLS}
                    if self.labelled
                    else {},
                }
            )
        return {
            "images": len(arena.scenes),
            "evaluated": self.evaluated,
            "labelled": self.labelled,
            "failed": self.failed,
            "reference": arena.reference,
            "split": arena.split,
            "points": config.points,
            "left_out": self.left_out,
            "models": models,
            "per_image": [{**one, "key": shown(one["key"])} for one in self.per_image],
            "device": str(arena.device),
            "seed": config.seed,
            "notes": [*arena.notes, *self._label_notes()],
            "report": None if config.report is None else str(config.report),
        }
