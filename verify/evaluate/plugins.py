"""Models of others that have the interface of SAM's predictor, found by the entry points of installed packages."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ...common.errors import VerifyError
from ...distill.students.cost import median_seconds
from .images import Scene
from .predictor import LIMIT, Answer, Cost, Floats
from .prompts import Prompts

GROUP = "mobilesam.predictors"
"""Of entry points: each is a function of a file (Path) and a device ("cpu", "cuda:0") that gives a predictor."""


def installed_predictors() -> Mapping[str, EntryPoint]:
    """Entry points by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def open_predictor(name: str, point: EntryPoint, file: Path, device: torch.device) -> PredictorContender:
    """Loads what the entry point names and has it open the file. Raises VerifyError for whatever it raises."""
    with named(f"--model {name}: the entry point {point.name} of {GROUP}"):
        predictor = point.load()(file, str(device))
    for method in ("set_image", "predict"):
        if not callable(getattr(predictor, method, None)):
            raise VerifyError(
                f"--model {name}: what the entry point {point.name} gives has no {method}: it has to be like "
                "segment_anything.SamPredictor"
            )
    return PredictorContender(name, predictor, device)


class PredictorContender:
    """A model with the interface of `segment_anything.SamPredictor`: `set_image(image)` and `predict(...)`.

    Of `predict` the arguments point_coords, point_labels, box and multimask_output are given, by name, and of what it
    returns the masks (C, H, W) and the scores (C,) are looked at. Its parameters are those of its attribute `model`,
    if that is a torch module.
    """

    several = True

    def __init__(self, name: str, predictor: Any, device: torch.device) -> None:
        self.name = name
        self._device = device
        self._predictor = predictor
        self._size = (0, 0)

    def look(self, scene: Scene) -> bool:
        """Hands over the picture as it is in its file."""
        image_HWC = scene.pixels().copy()
        self._size = image_HWC.shape[0], image_HWC.shape[1]
        with self._named("set_image"):
            self._predictor.set_image(image_HWC)
        return True

    def answer(self, prompts: Prompts, several: bool) -> list[Answer]:
        """Asks for each prompt by itself. Raises VerifyError for masks or scores of another shape."""
        answers = []
        for index in range(len(prompts)):
            points, labels, boxes = prompts.points_NP2, prompts.labels_NP, prompts.boxes_N4
            with self._named("predict"):
                masks, scores, *_ = self._predictor.predict(
                    point_coords=None if points is None else points[index],
                    point_labels=None if labels is None else labels[index],
                    box=None if boxes is None else boxes[index],
                    multimask_output=several,
                )
            answers.append(self._checked(np.asarray(masks), np.asarray(scores, dtype=np.float64)))
        return answers

    def cost(self) -> Cost:
        """Times both calls on a grey picture of 1024 x 1024."""
        image_HWC = np.full((1024, 1024, 3), 128, dtype=np.uint8)
        point = {"point_coords": np.array([[512.0, 512.0]]), "point_labels": np.array([1]), "box": None}
        with self._named("set_image"):
            looking = median_seconds(lambda: self._predictor.set_image(image_HWC), self._device, LIMIT)
        with self._named("predict"):
            answering = median_seconds(
                lambda: self._predictor.predict(**point, multimask_output=False), self._device, LIMIT
            )
        model = getattr(self._predictor, "model", None)
        parameters = sum(p.numel() for p in model.parameters()) if isinstance(model, nn.Module) else None
        return Cost(parameters=parameters, encoder_ms=1000 * looking, decoder_ms=1000 * answering)

    def _checked(self, masks: npt.NDArray, scores: Floats) -> Answer:
        if (
            masks.ndim != 3
            or not len(masks)
            or masks.shape[1:] != self._size
            or scores.shape != masks.shape[:1]
        ):
            wanted = f"masks (C, {self._size[0]}, {self._size[1]}) and scores (C,)"
            raise VerifyError(
                f"{self.name}'s predict gave masks {masks.shape} and scores {scores.shape}, not {wanted}"
            )
        return Answer(masks_CHW=torch.from_numpy(np.ascontiguousarray(masks.astype(bool))), scores_C=scores)

    def _named(self, call: str) -> AbstractContextManager[None]:
        return named(f"{self.name}'s {call}")


@contextmanager
def named(what: str) -> Iterator[None]:
    """Whatever another's code raises, as a VerifyError that says whose code it was."""
    try:
        yield
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise VerifyError(f"{what} failed with {type(error).__name__}: {told}") from error


# --- FastSAM in an evaluation, through ultralytics where that is installed.
#
# It has no decoder for prompts. It segments everything once, and ultralytics' own prompting then chooses among those
# masks: for points the union of the masks that hold a foreground point and no background point, for a box the mask
# whose IoU with the box is highest.
#

LICENCE = "AGPL-3.0"

PACKAGE = "ultralytics"

SETTINGS = {"imgsz": 1024, "conf": 0.4, "iou": 0.9, "retina_masks": True, "verbose": False}
"""FastSAM's own, of its Inference.py: side in pixels, least confidence, overlap that non-maximum suppression leaves,
masks at the image's resolution."""


def open_fastsam(name: str, file: Path, device: torch.device) -> FastSamContender:
    """Raises VerifyError where ultralytics isn't installed, or can't open the file.

    The file is a pickle of ultralytics' classes, which can run code when it is loaded: that is theirs to check.
    """
    if not _installed():
        raise VerifyError(
            f"--model {name}: FastSAM runs through {PACKAGE} (licence {LICENCE}), which is not installed: "
            "pip install 'mobilesam[fastsam]'"
        )
    if not file.is_file():  # else it would be downloaded
        raise VerifyError(
            f"--model {name}: there is no file {file}; give FastSAM's weights, such as FastSAM-s.pt"
        )
    # It would install what it misses, and tell its maker that it is used.
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("YOLO_OFFLINE", "true")
    with named(f"--model {name}: {PACKAGE}"), _standard_output_kept_clean():
        from ultralytics import FastSAM

        return FastSamContender(name, FastSAM(str(file)), device)


def _installed() -> bool:
    try:
        return importlib.util.find_spec(PACKAGE) is not None
    except ValueError:  # sys.modules holds None for it: blocked
        return False


class FastSamContender:
    """A model of ultralytics' class FastSAM."""

    several = False

    def __init__(self, name: str, model: Any, device: torch.device) -> None:
        self.name = name
        self._model = model
        self._device = device
        self._everything: Any = None
        self._size = (0, 0)

    def look(self, scene: Scene) -> bool:
        """Segments everything in the picture as it is in its file."""
        image_HWC = scene.pixels()
        self._size = image_HWC.shape[0], image_HWC.shape[1]
        self._everything = self._segment(image_HWC)
        return True

    def answer(self, prompts: Prompts, several: bool) -> list[Answer]:
        """The masks that ultralytics' prompting chooses, as one."""
        assert not several, "there is one mask"
        return [self._answer(prompts.take(slice(index, index + 1))) for index in range(len(prompts))]

    def _answer(self, prompt: Prompts) -> Answer:
        chosen: dict[str, Any] = {}
        if prompt.points_NP2 is not None and prompt.labels_NP is not None:
            # It counts pixels, and would round 0.9 down as we do.
            chosen = {"points": prompt.points_NP2[0].astype(np.int64), "labels": prompt.labels_NP[0]}
        elif prompt.boxes_N4 is not None:
            chosen = {"bboxes": prompt.boxes_N4[0]}
        with named(f"{self.name}'s prompt"), _standard_output_kept_clean():
            (result,) = self._model.predictor.prompt(self._everything, **chosen)
        mask_HW = torch.zeros(self._size, dtype=torch.bool)
        if result.masks is not None and len(result.masks.data):
            mask_HW = result.masks.data.bool().any(dim=0).cpu()
        if mask_HW.shape != self._size:
            raise VerifyError(
                f"{self.name} gave a mask of {tuple(mask_HW.shape)} for an image of {self._size}"
            )
        return Answer(masks_CHW=mask_HW[None], scores_C=np.ones(1))

    def cost(self) -> Cost:
        """Parameters, and the time for everything in a picture of 1024 x 1024, from pixels to masks."""
        image_HWC = np.full((1024, 1024, 3), 128, dtype=np.uint8)
        seconds = median_seconds(lambda: self._segment(image_HWC), self._device, LIMIT)
        parameters = sum(parameter.numel() for parameter in self._model.model.parameters())
        return Cost(parameters=parameters, encoder_ms=1000 * seconds)

    def _segment(self, image_HWC: np.ndarray) -> Any:
        # Arrays are taken for BGR.
        source = np.ascontiguousarray(image_HWC[..., ::-1])
        with named(f"{self.name}'s predict"), _standard_output_kept_clean():
            return self._model.predict(source=source, device=str(self._device), **SETTINGS)[0]


def _standard_output_kept_clean() -> contextlib.AbstractContextManager[Any]:
    """Results alone go to standard output; ultralytics logs there."""
    return contextlib.redirect_stdout(sys.stderr)
