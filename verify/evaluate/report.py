"""Report of an evaluation: one HTML file with the tables, and the masks of all models side by side.

Shape suffixes: P prompts, N points of one prompt, T masks of one prompt, H and W rows and columns of an image or
mask, C channels, 2 (x, y).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...common.errors import VerifyError, shown
from ...sam import ImageError
from ...sam.modeling.decode_prompts import Prompts
from ..gallery import worst_and_best
from ..rendering.images import POINT_COLOURS, Bools, Floats, Rgb, choose_points, paint_masks, thumbnail_uri
from ..report import EVALUATE_REPORT, page_environment, write_page
from .config import EvaluateConfig
from .images import LazyImage
from .inputs import EvaluationInputs
from .iou import single_iou
from .predictor import Predictor
from .prompts import centre_of_mask, choose_objects, point_prompts
from .sam_predictor import prompts_at_once
from .table import no_numbers, tables

TEMPLATE = "evaluation.html.j2"

MOST_SHOWN = 3
"""Largest number of worst images on the page, and of best images."""

CHOICE_SIDE = 512
"""Longer side in pixels to which masks are reduced for choosing those that differ."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Masks of one model, or the reference masks, over a photo."""

    name: str
    """Name of the model or of the reference."""
    uri: str
    """Data URI."""
    ious: Sequence[tuple[str, float]]
    """CSS colour and IoU of each prompt; empty for the reference masks."""


@dataclass(frozen=True, kw_only=True)
class PanelRow:
    """Pictures of the masks for the same prompts: the reference masks, then each model's."""

    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True, kw_only=True)
class ImagePanel:
    """One image with its rows of pictures."""

    name: str
    size: tuple[int, int]
    """Height and width of the photo in pixels."""
    photo: str
    """Data URI."""
    rows: Sequence[PanelRow]
    means: Sequence[tuple[str, float | None]]
    """Each model's name and mean IoU over the image's prompts."""


def write_evaluation_report(
    path: Path,
    result: Mapping[str, Any],
    inputs: EvaluationInputs,
    config: EvaluateConfig,
    drawn: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Predict the masks of the worst and the best images again, and write the page.

    Args:
        path: HTML file to create or replace.
        result: result of `evaluate_masks`.
        inputs: inputs of the evaluation, still open.
        config: options of the evaluation.
        drawn: called with the number of photos drawn and the total.

    Raises:
        VerifyError: an image can't be read any longer, or the page can't be written.
    """
    worst, best = _worst_and_best(result["per_image"])
    index_of = {shown(inputs.images.key(index)): index for index in range(len(inputs.images))}
    panels: list[ImagePanel] = []
    for one in [*worst, *best]:
        drawn(len(panels), len(worst) + len(best))
        panels.append(_image_panel(inputs, config, index_of[one["key"]], one["miou"]))
    drawn(len(panels), len(panels))
    page = (
        page_environment()
        .get_template(TEMPLATE)
        .render(
            result=result,
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            tables=tables(result),
            worst=panels[: len(worst)],
            best=panels[len(worst) :],
            no_numbers=None if result["evaluated"] else no_numbers(result),
        )
    )
    write_page(path, page, EVALUATE_REPORT)


def _worst_and_best(per_image: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Return the images with the lowest and with the highest mean over models; undefined means are left out."""
    means = []
    for one in per_image:
        values = list(one["miou"].values())
        means.append(None if None in values else float(np.mean(values)))
    worst, best = worst_and_best(means, MOST_SHOWN)
    return [per_image[i] for i in worst], [per_image[i] for i in best]


def _image_panel(
    inputs: EvaluationInputs, config: EvaluateConfig, index: int, means: Mapping[str, float | None]
) -> ImagePanel:
    try:
        image = inputs.images.read(index)
    except ImageError as error:  # it was readable during the evaluation
        raise VerifyError(f"{shown(inputs.images.key(index))}: {error}") from error
    photo_HWC = image.pixels() if inputs.images.root is not None else image.resized(1024).pixels_HWC
    for predictor in inputs.predictors:
        predictor.set_image(image)
    rows = []
    if inputs.teacher is not None and config.points:
        inputs.teacher.set_image(image)
        prompts, wanted_PHW = _teacher_masks(inputs.teacher, config, image, inputs.device)
        pictures = _pictures(inputs, image, photo_HWC, prompts, inputs.teacher.name, wanted_PHW)
        rows.append(PanelRow(title="The same points", pictures=pictures))
    labelled = _labelled_masks(inputs, config, image)
    if labelled is not None:
        prompts, wanted_PHW = labelled
        pictures = _pictures(inputs, image, photo_HWC, prompts, "labels", wanted_PHW)
        rows.append(PanelRow(title="Centers of labelled objects", pictures=pictures))
    return ImagePanel(
        name=image.key,
        size=(photo_HWC.shape[0], photo_HWC.shape[1]),
        photo=thumbnail_uri(photo_HWC),
        rows=rows,
        means=list(means.items()),
    )


def _teacher_masks(
    teacher: Predictor, config: EvaluateConfig, image: LazyImage, device: torch.device
) -> tuple[Prompts, Bools]:
    """Return prompts of points whose teacher masks differ from each other, and these masks."""
    prompts = point_prompts(config.points, image.original_size)
    # Reduced, since all masks together may have thousands of times as many pixels as the photo.
    step = -(-max(image.original_size) // CHOICE_SIDE)
    chosen = choose_points(_single_masks(teacher, prompts, image, device, step))
    prompts = Prompts.of_points(prompts.points_PN2[chosen, 0])
    return prompts, _single_masks(teacher, prompts, image, device)


def _labelled_masks(
    inputs: EvaluationInputs, config: EvaluateConfig, image: LazyImage
) -> tuple[Prompts, Bools] | None:
    """Return the centres and masks of the largest labelled objects that differ from each other; None without any."""
    labels = inputs.read_labels(image)
    if not labels:
        return None
    chosen = choose_objects(len(labels), config.max_objects, config.seed, image.key)
    chosen = sorted(chosen, key=lambda index: -int(labels.areas_P[index]))[: 4 * len(POINT_COLOURS)]
    masks_PHW = np.stack([labels.mask(index) for index in chosen])
    wanted_PHW = masks_PHW[choose_points(masks_PHW, len(POINT_COLOURS))]
    centres_P2 = np.array([centre_of_mask(mask_HW) for mask_HW in wanted_PHW], dtype=np.float64)
    return Prompts.of_points(centres_P2), wanted_PHW


def _single_masks(
    predictor: Predictor, prompts: Prompts, image: LazyImage, device: torch.device, step: int = 1
) -> Bools:
    """Return the mask for each prompt, reduced to every `step`-th of its rows and columns."""
    at_once = prompts_at_once(image.original_size, device)
    masks = (
        predicted.masks_THW[0]
        for _, part in prompts.parts(at_once)
        for predicted in predictor.predict(part, False)
    )
    return np.stack([mask_HW[::step, ::step].cpu().numpy() for mask_HW in masks])


def _pictures(
    inputs: EvaluationInputs,
    image: LazyImage,
    photo_HWC: Rgb,
    prompts: Prompts,
    wanted_name: str,
    wanted_PHW: Bools,
) -> list[Picture]:
    """Paint the reference masks, and the masks that each model predicts for the same prompts of one point."""
    height, width = image.original_size
    points_P2 = (prompts.points_PN2[:, 0].numpy() + 0.5) / (width, height)
    pictures = [_picture(wanted_name, photo_HWC, wanted_PHW, points_P2, ())]
    for predictor in inputs.predictors:
        predicted = predictor.predict(prompts, False)
        masks_PHW = np.stack([one.masks_THW[0].cpu().numpy() for one in predicted])
        ious = [
            single_iou(one, torch.from_numpy(wanted_HW.copy()))
            for one, wanted_HW in zip(predicted, wanted_PHW, strict=True)
        ]
        pictures.append(_picture(predictor.name, photo_HWC, masks_PHW, points_P2, ious))
    return pictures


def _picture(
    name: str, photo_HWC: Rgb, masks_PHW: Bools, points_P2: Floats, ious: Sequence[float]
) -> Picture:
    colours = [f"rgb{colour}" for colour in POINT_COLOURS]
    return Picture(
        name=name,
        uri=thumbnail_uri(paint_masks(photo_HWC, masks_PHW, points_P2)),
        ious=list(zip(colours, ious, strict=False)),
    )
