"""`mobilesam evaluate`: masks of several models against the teacher's and against labels, and the models' cost.

Shape suffixes: P prompts, H and W rows and columns of a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.errors import shown
from ...sam import AnnotationError, Annotations, CocoInstances, ImageError, LabelCounts, LabelMasks
from ...sam.modeling.decode_prompts import Prompts
from ..report import EVALUATE_REPORT, check_report, report_errors
from . import iou
from .config import EvaluateConfig
from .images import LazyImage
from .inputs import EvaluationInputs, open_evaluation
from .iou import IouTotals
from .models import LoadedModel
from .predictor import PredictedMasks, Predictor
from .prompts import centre_of_mask, choose_objects, pair_prompts, point_prompts
from .report import write_evaluation_report
from .sam_predictor import prompts_at_once

Progress = Callable[[int, int], None]
"""Callback with the number done and the total."""

Score = Callable[[PredictedMasks, Tensor], float]
"""Function of the predicted masks of one prompt and the reference mask, bool (H, W), that returns an IoU."""

ImageIous = dict[str, dict[str, list[float]]]
"""IoU of each prompt of one image, by model and protocol."""


def evaluate_masks(
    config: EvaluateConfig,
    *,
    progress: Progress | None = None,
    download: Progress | None = None,
    phase: Callable[[str], None] = lambda text: None,
    drawn: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Compare the masks of models with the teacher's and with labels.

    Args:
        config: all options.
        progress: called with the number of images done and the total.
        download: called with (bytes done, bytes in total) while a teacher's checkpoint is downloaded.
        phase: called with what begins, where there are no images to count.
        drawn: for a report, called with the number of photos drawn and the total.

    Returns:
        The JSON object that `--json` prints:

        - `images`: total number of images; `evaluated`: number of images that were compared; `labelled`: number of
          images with labelled objects; `failed`: {key, reason} of each image that couldn't be read or whose labels
          are damaged.
        - `labels`: the labels' `source` (None for files beside the images), `images` that they are of, number of
          `objects` that can be used and of those `left_out` by reason; None without labels. From a file or folder
          also its `names`: numbers of `listed`, `matched`, `missing` and `ambiguous` ones, and the first of these.
        - `reference`: the teacher, None without one. `left_out`: number of pairs of points that didn't fit into their
          images, by protocol.
        - `models`: for each its names, its cost (see `Cost`), and

          - `teacher`: {miou, prompts, images} by protocol: IoU with the teacher's mask for the same prompt, SAM's
            single mask for both, at the image's original resolution; mean over an image's prompts, then over
            images.
          - `labels`: the same for boxes and centres of labelled objects, mean over all objects.
        - `per_image`: each image's mean IoU of protocol `point` (without it `center`), by model.
        - `split`, `points`, `device`, `seed`, `notes`, `report`.

    Raises:
        ReportError: only the report failed; the error carries the result.
        VerifyError: a model or another input can't be used.
        StoreError, DistillError, SamError: a model or store is missing or damaged.
    """
    if config.report is not None:
        check_report(config.report, EVALUATE_REPORT)
    with ExitStack() as stack:
        phase("loading the models")
        inputs = open_evaluation(config, stack, download)
        evaluation = _Evaluation(inputs, config)
        phase("comparing images")
        for index in range(len(inputs.images)):
            evaluation.add(index)
            if progress is not None:
                progress(index + 1, len(inputs.images))
        result = evaluation.result(phase)
        if config.report is not None:
            with report_errors(result, result):
                phase("drawing photos")
                write_evaluation_report(config.report, result, inputs, config, drawn)
    return result


class _Evaluation:
    """Measurements of an evaluation, accumulated image by image."""

    def __init__(self, inputs: EvaluationInputs, config: EvaluateConfig) -> None:
        self.inputs, self.config = inputs, config
        self.compares_teacher = inputs.teacher is not None and config.points > 0
        self.totals = {model.name: IouTotals() for model in inputs.models}
        self.per_image: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self.left_out: dict[str, int] = {}
        if self.compares_teacher:
            self.left_out = {iou.pair_name(distance): 0 for distance in config.distances}
        self.evaluated = 0
        self.labelled = 0
        self.covered = 0
        """Number of images with a label file or an entry in one, even if it lists no object."""
        self.objects = LabelCounts()

    def add(self, index: int) -> None:
        """Measure one image. Errors in the image or its labels are found before any model is run."""
        try:
            image = self.inputs.images.read(index)
            labels = self.inputs.read_labels(image)
            for size in self.inputs.encoder_sizes:
                image.resized(size)
        except (ImageError, AnnotationError) as error:
            key = self.inputs.images.key(index)
            self.failed.append({"key": shown(key), "reason": shown(" ".join(str(error).split()))})
            return
        if labels is not None:
            self.covered += 1
            self.objects.add(image.key, len(labels), labels.left_out)
        if not self.compares_teacher and not labels:
            return
        finite = {predictor.name: predictor.set_image(image) for predictor in self.inputs.predictors}
        ious: ImageIous = {predictor.name: {} for predictor in self.inputs.predictors}
        if self.inputs.teacher is not None and self.compares_teacher:
            self._compare_with_teacher(self.inputs.teacher, image, ious)
        if labels:
            self._compare_with_labels(labels, image, ious)
            self.labelled += 1
        self.evaluated += 1
        self._add_to_totals(image, ious, finite)

    def _compare_with_teacher(self, teacher: Predictor, image: LazyImage, ious: ImageIous) -> None:
        side, size = self.config.points, image.original_size
        protocols = {iou.POINT: point_prompts(side, size)}
        for distance in self.config.distances:
            name = iou.pair_name(distance)
            protocols[name], missing = pair_prompts(side, size, distance, self.config.seed, image.key)
            self.left_out[name] += missing
        finite = teacher.set_image(image)
        for name, prompts in protocols.items():
            for _, part in prompts.parts(prompts_at_once(size, self.inputs.device)):
                wanted = [predicted.masks_THW[0] for predicted in teacher.predict(part, False)]
                self._score(part, wanted, {name: iou.single_iou}, ious, undefined=not finite)

    def _compare_with_labels(self, labels: Annotations, image: LazyImage, ious: ImageIous) -> None:
        chosen = choose_objects(len(labels), self.config.max_objects, self.config.seed, image.key)
        at_once = prompts_at_once(image.original_size, self.inputs.device)
        for start in range(0, len(chosen), at_once):
            objects = chosen[start : start + at_once]
            masks = [labels.mask(index) for index in objects]
            wanted = [torch.from_numpy(mask_HW.copy()) for mask_HW in masks]
            boxes = Prompts.of_boxes(labels.boxes_P4[objects])
            centres = Prompts.of_points(
                np.array([centre_of_mask(mask_HW) for mask_HW in masks], dtype=np.float64)
            )
            self._score(boxes, wanted, {iou.BOX: iou.single_iou}, ious)
            self._score(centres, wanted, {iou.CENTRE: iou.single_iou}, ious)
            of_three = {iou.TOP_SCORED: iou.top_scored_iou, iou.ORACLE: iou.oracle_iou}
            self._score(centres, wanted, of_three, ious, multimask_output=True)

    def _score(
        self,
        prompts: Prompts,
        wanted: Sequence[Tensor],
        scores: Mapping[str, Score],
        ious: ImageIous,
        *,
        multimask_output: bool = False,
        undefined: bool = False,
    ) -> None:
        """Predict every model's masks for the prompts, and add their IoUs to `ious`.

        Args:
            prompts: prompts for the image that was set.
            wanted: reference mask of each prompt, bool (H, W).
            scores: score by protocol.
            ious: dictionary to add the IoUs to.
            multimask_output: predict several masks per prompt; models that can't are left out.
            undefined: the reference masks are invalid, so that every IoU is NaN.
        """
        for predictor in self.inputs.predictors:
            if multimask_output and not predictor.multimask:
                continue
            predicted = predictor.predict(prompts, multimask_output)
            for protocol, score in scores.items():
                ious_P = [score(masks, wanted_HW) for masks, wanted_HW in zip(predicted, wanted, strict=True)]
                ious[predictor.name].setdefault(protocol, []).extend(
                    [float("nan")] * len(ious_P) if undefined else ious_P
                )

    def _add_to_totals(self, image: LazyImage, ious: ImageIous, finite: Mapping[str, bool]) -> None:
        means: dict[str, float | None] = {}
        for name, by_protocol in ious.items():
            for protocol, ious_P in by_protocol.items():
                # Masks of an embedding that isn't finite are empty, and the IoU of two empty masks would be 1.
                self.totals[name].add(protocol, ious_P if finite[name] else [float("nan")] * len(ious_P))
            shown_P = by_protocol.get(iou.POINT) or by_protocol.get(iou.CENTRE) or []
            mean = float(np.mean(shown_P)) if shown_P and finite[name] else float("nan")
            means[name] = None if np.isnan(mean) else mean
        self.per_image.append({"key": image.key, "miou": means})

    def result(self, phase: Callable[[str], None]) -> dict[str, Any]:
        """Return the result of `evaluate_masks`. Models are timed here, since timing loses the image that was set."""
        inputs, config = self.inputs, self.config
        models = []
        for number, model in enumerate(inputs.models, 1):
            phase(f"timing model {number} of {len(inputs.models)}, {model.name}")
            models.append(self._model_result(model))
        return {
            "images": len(inputs.images),
            "evaluated": self.evaluated,
            "labelled": self.labelled,
            "failed": self.failed,
            "labels": self._labels_result(),
            "reference": inputs.reference,
            "split": inputs.split,
            "points": config.points,
            "left_out": self.left_out,
            "models": models,
            "per_image": [{**one, "key": shown(one["key"])} for one in self.per_image],
            "device": str(inputs.device),
            "seed": config.seed,
            "notes": [*inputs.notes, *self._label_notes()],
            "report": None if config.report is None else str(config.report),
        }

    def _model_result(self, model: LoadedModel) -> dict[str, Any]:
        totals = self.totals[model.name]
        protocols = (iou.POINT, *self.left_out) if self.compares_teacher else ()
        label_protocols = iou.LABEL_PROTOCOLS if self.labelled else ()
        return {
            **model.to_json(),
            **(vars(model.predictor.cost()) if self.evaluated else {}),
            "teacher": {name: totals.by_image(name) for name in protocols},
            "labels": {name: totals.by_object(name) for name in label_protocols},
        }

    def _labels_result(self) -> dict[str, Any] | None:
        """Return the numbers of labels; None if there are none."""
        source, match = self.inputs.labels, self.inputs.match
        if source is None or (match is None and not self.covered):
            return None
        return {
            "source": str(source.path) if isinstance(source, CocoInstances | LabelMasks) else None,
            "images": self.covered,
            "objects": self.objects.used,
            "left_out": self.objects.by_reason(),
            **({} if match is None else {"names": match.to_json()}),
            **({"unusable": dict(source.unusable)} if isinstance(source, CocoInstances) else {}),
        }

    def _label_notes(self) -> list[str]:
        """Return notes on labels that were left out, and on listed names that match no image or several."""
        source, match = self.inputs.labels, self.inputs.match
        notes = self.objects.lines()
        if isinstance(source, CocoInstances) and source.unusable:
            reasons = "; ".join(f"{reason}: {count:,}" for reason, count in source.unusable.most_common())
            notes.append(f"{source.path.name}: entries left out ({reasons})")
        if match is not None and isinstance(source, CocoInstances | LabelMasks):
            notes += match.lines(source.path.name)
        return notes
