"""`mobilesam segment`: check the request, load the model, predict masks, write them.

Shape suffixes: H, W rows and columns of an image, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.errors import PredictError, counted, shown
from ..common.table import Table
from ..sam import ImageError, decode_image, read_image, resized_size
from ..sam.weights.download import Progress
from .config import SegmentConfig
from .mask_files import Mask, add_masks, check_masks_folder, encode_rle, mask_name
from .model import Model, load_model, load_teacher_model, size_words
from .outputs import OVERLAY, RLE, Outputs, check_file
from .overlay import check_format, draw_overlay, encode_picture
from .predictor import Prediction, predict
from .prompts import ImagePrompts


def segment(
    config: SegmentConfig,
    *,
    download: Progress | None = None,
    phase: Callable[[str], None] = lambda text: None,
    points_done: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Segment one image in float32, draw the masks over it, and write the output files.

    Invalid options and outputs are refused before the model is loaded. Either all existing files are replaced, or, if
    one can't be written, none.

    Args:
        config: all options.
        download: called with (bytes done, bytes in total) while a teacher's checkpoint is downloaded.
        phase: called with what begins now.
        points_done: for everything, called with (points done, points in total).

    Returns:
        The object that `--json` prints: `image`, `original_size` (height, width), `student` (its name; None for a
        teacher), `teacher`, `model` (its file), `head`, `image_size`, `student_size`, `device`, `notes`,
        `embedding_seconds`, `mask_seconds`, `masks` (`area` in pixels, `bbox` as x, y, width, height in pixels,
        `predicted_iou`, `stability_score`, `file`), and the files and folders written: `out`, `masks_dir`, `rle`.
        Masks are in the order of the boxes; for everything by area, the largest first.

    Raises:
        PredictError: a prompt lies outside the image, an output can't be written, or there isn't enough memory.
        ImageError, DistillError, StoreError, SamError: the image, the model or the store is missing or damaged.
    """
    _check_outputs(config)
    image_HWC = _read_image(config.image)
    original_size = image_HWC.shape[0], image_HWC.shape[1]
    prompts, notes = config.prompts.inside(original_size)
    check_format(config.out.suffix, original_size)
    phase("loading the model")
    model = _load(config, download)
    _check_resized(config.image, original_size, model.student_size)
    phase("embedding the image")
    prediction = _predict(model, image_HWC, prompts, points_done)
    notes += [] if prediction.note is None else [prediction.note]
    phase("writing")
    _write(config, image_HWC, prompts, prediction.masks)
    return _result(config, original_size, model, prediction, notes)


def _check_outputs(config: SegmentConfig) -> None:
    check_file(config.out, "--out", OVERLAY)
    if config.rle is not None:
        check_file(config.rle, "--rle", RLE)
    if config.masks is not None:
        check_masks_folder(config.masks)


def _read_image(path: Path) -> npt.NDArray[np.uint8]:
    # Reading from a pipe or a device might never end.
    if path.exists() and not path.is_file():
        raise ImageError(f"{shown(str(path))} is not a regular file: give an image's file")
    try:
        return decode_image(read_image("", str(path)))
    except ImageError as error:
        raise ImageError(f"{shown(str(path))}: {error}") from error


def _check_resized(path: Path, original_size: tuple[int, int], student_size: int) -> None:
    """Refuse an image so thin that one side would be 0 pixels after resizing."""
    try:
        resized_size(*original_size, student_size)
    except ImageError as error:
        raise ImageError(f"{shown(str(path))}: {error}") from error


def _load(config: SegmentConfig, download: Progress | None) -> Model:
    if config.teacher is None:
        return load_model(
            config.student, head=config.head, device=config.device, image_size=config.image_size
        )
    return load_teacher_model(
        config.teacher,
        config.checkpoint,
        head=config.head,
        device=config.device,
        image_size=config.image_size or 1024,
        download=download,
    )


def _predict(
    model: Model, image_HWC: npt.NDArray[np.uint8], prompts: ImagePrompts, points_done: Progress
) -> Prediction:
    try:
        return predict(model.sam, image_HWC, prompts, points_done)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        height, width = image_HWC.shape[:2]
        raise PredictError(
            f"out of memory on {model.device} with an image of {width} x {height} pixels: "
            "give a smaller image, or another --device"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    by_name = type(error).__name__ == "OutOfMemoryError"
    # torch has no exception class for exhausted CPU memory.
    return by_name or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _write(
    config: SegmentConfig, image_HWC: npt.NDArray[np.uint8], prompts: ImagePrompts, masks: Sequence[Mask]
) -> None:
    picture = draw_overlay(image_HWC, masks, prompts)
    with Outputs() as outputs:
        stale = [] if config.masks is None else add_masks(outputs, config.masks, masks)
        outputs.add(config.out, encode_picture(picture, config.out.suffix), "--out", OVERLAY)
        if config.rle is not None:
            text = encode_rle(masks, config.image.name, (image_HWC.shape[0], image_HWC.shape[1]))
            outputs.add(config.rle, text, "--rle", RLE)
        outputs.commit(stale)


def _result(
    config: SegmentConfig,
    original_size: tuple[int, int],
    model: Model,
    prediction: Prediction,
    notes: Sequence[str],
) -> dict[str, Any]:
    masks = [
        {
            "area": mask.area,
            "bbox": mask.bbox,
            "predicted_iou": mask.predicted_iou,
            "stability_score": mask.stability_score,
            "file": None if config.masks is None else str(config.masks / mask_name(index)),
        }
        for index, mask in enumerate(prediction.masks)
    ]
    return {
        "image": str(config.image),
        "original_size": list(original_size),
        "student": model.student if config.teacher is None else None,
        "teacher": model.info.get("teacher"),
        "model": None if model.file is None else str(model.file),
        "head": model.head_source,
        "image_size": model.image_size,
        "student_size": model.student_size,
        "device": str(model.device),
        "notes": [*model.notes, *notes],
        "embedding_seconds": prediction.embedding_seconds,
        "mask_seconds": prediction.mask_seconds,
        "masks": masks,
        "out": str(config.out),
        "masks_dir": None if config.masks is None else str(config.masks),
        "rle": None if config.rle is None else str(config.rle),
    }


ROWS = 20
"""Largest number of masks listed; everything may find hundreds."""


def segment_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the result of `segment` as text: the model, its notes, the seconds, each mask, the files written."""
    height, width = result["original_size"]
    name, masks = result["student"] or result["teacher"], result["masks"]
    places = {"overlay": result["out"], "masks": result["masks_dir"], "RLE": result["rle"]}
    lines = [
        f"{result['image']}: {width} x {height} pixels, {name} at {size_words(result)} on {result['device']}",
        *(f"note: {note}" for note in result["notes"]),
        f"embedding {result['embedding_seconds']:.2f} s, {counted(len(masks), 'mask')} "
        f"{result['mask_seconds']:.2f} s",
        *(_masks_table(masks, height * width).lines() if masks else []),
        *(f"{kind:<8}{place}" for kind, place in places.items() if place is not None),
    ]
    return [shown(line) for line in lines]


def _masks_table(masks: Sequence[Mapping[str, Any]], pixels: int) -> Table:
    return Table(
        title="",
        columns=("mask", "area", "share", "x, y, width, height", "IoU", "stability"),
        numeric=(True, True, True, False, True, True),
        rows=[
            (
                str(index),
                f"{mask['area']:,}",
                f"{mask['area'] / pixels:.1%}",
                ", ".join(map(str, mask["bbox"])),
                _score(mask["predicted_iou"]),
                _score(mask["stability_score"]),
            )
            for index, mask in enumerate(masks[:ROWS])
        ],
        note=f"and {len(masks) - ROWS:,} more" if len(masks) > ROWS else "",
    )


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
