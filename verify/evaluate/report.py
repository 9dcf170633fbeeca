"""The report of an evaluation: one HTML file with the tables, and the masks of every model side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...common.errors import VerifyError, shown
from ...sam import ImageError
from ..gallery import pick_extremes
from ..rendering.images import COLOURS, LONGEST, Bools, Floats, Rgb, choose_points, paint_masks, thumbnail_uri
from ..report import page_environment, write_page
from .config import EvaluateConfig
from .images import Scene
from .inputs import Arena
from .iou import first_iou
from .predictor import Contender
from .prompts import Prompts, centre_of_mask, choose_objects, point_prompts
from .sam_predictor import prompts_at_once
from .table import nothing_told, tables

TELLING = 512
"""Pixels of a mask's longer side that tell it from others."""
SHOWN = 3
"""Images on the page of the worst, and of the best."""

TEMPLATE = "evaluation.html.j2"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One model's masks over a photo."""

    name: str
    uri: str
    ious: Sequence[tuple[str, float]]
    """The colour of each prompt, for CSS, and its IoU; none for what is compared with."""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """The same prompts to everybody."""

    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """One image with its strips."""

    name: str
    width: int
    height: int
    photo: str
    strips: Sequence[Strip]
    figures: Sequence[tuple[str, float | None]]
    """Each model's mean over the image's prompts."""


def write_evaluation_report(
    path: Path, result: Mapping[str, Any], arena: Arena, config: EvaluateConfig
) -> None:
    """Looks at the worst and the best images once more, and writes the page. Raises VerifyError where it can't."""
    worst, best = _chosen(result["per_image"])
    where = {shown(arena.scenes.key(index)): index for index in range(len(arena.scenes))}
    exhibits = [
        [_exhibit(arena, config, where[one["key"]], one["miou"]) for one in some] for some in (worst, best)
    ]
    page = (
        page_environment()
        .get_template(TEMPLATE)
        .render(
            result=result,
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            tables=tables(result),
            worst=exhibits[0],
            best=exhibits[1],
            nothing=None if result["evaluated"] else nothing_told(result),
        )
    )
    write_page(path, page)


def _chosen(per_image: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """The images of the lowest and of the highest mean over the models; where it is undefined, none."""
    means = []
    for one in per_image:
        values = list(one["miou"].values())
        means.append(None if None in values else float(np.mean(values)))
    worst, best = pick_extremes(means, SHOWN)
    return [per_image[i] for i in worst], [per_image[i] for i in best]


def _exhibit(
    arena: Arena, config: EvaluateConfig, index: int, figures: Mapping[str, float | None]
) -> Exhibit:
    try:
        scene = arena.scenes.read(index)
    except ImageError as error:  # it was readable when it was measured
        raise VerifyError(f"{shown(arena.scenes.key(index))}: {error}") from error
    photo_HWC = scene.pixels() if arena.scenes.root is not None else scene.resized(1024).pixels_HWC
    for opened in arena.models:
        opened.contender.look(scene)
    strips = []
    if arena.teacher is not None and config.points:
        arena.teacher.look(scene)
        strips.append(_teacher_strip(arena, arena.teacher, config, scene, photo_HWC))
    strips += _label_strips(arena, config, scene, photo_HWC)
    return Exhibit(
        name=scene.key,
        width=photo_HWC.shape[1],
        height=photo_HWC.shape[0],
        photo=thumbnail_uri(photo_HWC, LONGEST),
        strips=strips,
        figures=list(figures.items()),
    )


def _teacher_strip(
    arena: Arena, teacher: Contender, config: EvaluateConfig, scene: Scene, photo_HWC: Rgb
) -> Strip:
    prompts = point_prompts(config.points, scene.original_size)
    # By every few of their pixels: all of the masks together have thousands of times as many as the photo.
    step = -(-max(scene.original_size) // TELLING)
    chosen = choose_points(_single_masks(teacher, prompts, scene, arena.device, step))
    prompts = Prompts.of_points(_points(prompts)[chosen])
    wanted_NHW = _single_masks(teacher, prompts, scene, arena.device)
    return _strip("The same points", str(teacher.name), arena, scene, photo_HWC, prompts, wanted_NHW)


def _label_strips(arena: Arena, config: EvaluateConfig, scene: Scene, photo_HWC: Rgb) -> list[Strip]:
    labels = arena.labels_of(scene)
    if not labels:
        return []
    chosen = choose_objects(len(labels), config.max_objects, config.seed, scene.key)
    # The largest objects that differ from each other.
    chosen = sorted(chosen, key=lambda index: -int(labels.areas_N[index]))[: 4 * len(COLOURS)]
    masks_NHW = np.stack([labels.mask(index) for index in chosen])
    wanted_NHW = masks_NHW[choose_points(masks_NHW, len(COLOURS))]
    prompts = Prompts.of_points(np.array([centre_of_mask(mask_HW) for mask_HW in wanted_NHW]))
    return [_strip("Centers of labelled objects", "labels", arena, scene, photo_HWC, prompts, wanted_NHW)]


def _strip(
    title: str, name: str, arena: Arena, scene: Scene, photo_HWC: Rgb, prompts: Prompts, wanted_NHW: Bools
) -> Strip:
    height, width = scene.original_size
    points_n2 = (_points(prompts) + 0.5) / (width, height)
    pictures = [_picture(name, photo_HWC, wanted_NHW, points_n2, ())]
    for opened in arena.models:
        answers = opened.contender.answer(prompts, False)
        masks_NHW = np.stack([answer.masks_CHW[0].cpu().numpy() for answer in answers])
        ious = [first_iou(a, torch.from_numpy(w.copy())) for a, w in zip(answers, wanted_NHW, strict=True)]
        pictures.append(_picture(opened.contender.name, photo_HWC, masks_NHW, points_n2, ious))
    return Strip(title=title, pictures=pictures)


def _picture(
    name: str, photo_HWC: Rgb, masks_NHW: Bools, points_n2: Floats, ious: Sequence[float]
) -> Picture:
    painted = paint_masks(photo_HWC, masks_NHW, points_n2, LONGEST)
    colours = [f"rgb{colour}" for colour in COLOURS]
    return Picture(
        name=name, uri=thumbnail_uri(painted, LONGEST), ious=list(zip(colours, ious, strict=False))
    )


def _single_masks(
    contender: Contender, prompts: Prompts, scene: Scene, device: torch.device, step: int = 1
) -> Bools:
    """A mask for each prompt, every `step`-th of its rows and columns."""
    at_once = prompts_at_once(scene.original_size, device)
    masks = (
        answer.masks_CHW[0] for _, part in prompts.parts(at_once) for answer in contender.answer(part, False)
    )
    return np.stack([mask_HW[::step, ::step].cpu().numpy() for mask_HW in masks])


def _points(prompts: Prompts) -> Floats:
    assert prompts.points_NP2 is not None, "points"
    return prompts.points_NP2[:, 0]
