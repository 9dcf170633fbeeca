"""Predictors of other packages: plugins with the interface of SamPredictor, and FastSAM through ultralytics.

Shape suffixes: P prompts, N points of one prompt, T masks of one prompt, H and W rows and columns of an image or
mask, C channels, 2 (x, y).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ...common.config import missing_packages
from ...common.errors import VerifyError
from ...distill.students.cost import median_seconds
from ...sam.modeling.decode_prompts import Prompts
from ...sam.registry import readable_entry_points
from .images import LazyImage
from .predictor import TIMING_SECONDS, Cost, Floats, PredictedMasks

GROUP = "mobilesam.predictors"
"""Group of entry points. Each is a function that takes a file (Path) and a device ("cpu", "cuda:0") and returns a
predictor."""

PACKAGE, LICENCE = "ultralytics", "AGPL-3.0"
"""Package that runs FastSAM, and its licence."""

FASTSAM_SETTINGS = {"imgsz": 1024, "conf": 0.4, "iou": 0.9, "retina_masks": True, "verbose": False}
"""Defaults of FastSAM's Inference.py: side in pixels, confidence threshold, IoU threshold of non-maximum suppression,
masks at the image's resolution."""


def installed_predictors() -> Mapping[str, EntryPoint]:
    """Return the entry points of installed packages by name."""
    return {point.name: point for point in readable_entry_points(GROUP)}


def open_predictor(name: str, point: EntryPoint, file: Path, device: torch.device) -> PluginPredictor:
    """Load an entry point's function, and call it to open a file.

    Args:
        name: name of the model in the evaluation.
        point: entry point of the group GROUP.
        file: file for the function, unchecked.
        device: device, passed to the function as text.

    Raises:
        VerifyError: the function raises any exception, or doesn't return a predictor.
    """
    with named(f"--model {name}: the entry point {point.name} of {GROUP}"):
        predictor = point.load()(file, str(device))
    for method in ("set_image", "predict"):
        if not callable(getattr(predictor, method, None)):
            raise VerifyError(
                f"--model {name}: the object from entry point {point.name} has no method {method}: it must have the "
                "interface of segment_anything.SamPredictor"
            )
    return PluginPredictor(name, predictor, device)


class PluginPredictor:
    """Model with the interface of `segment_anything.SamPredictor`: `set_image(image)` and `predict(...)`.

    `predict` is called with the keyword arguments point_coords, point_labels and box, numpy arrays or None, and
    multimask_output; of its results the masks (T, H, W) and the scores (T,) are used. Parameters are counted in the
    predictor's attribute `model`, if that is a torch module.

    Args:
        name: name of the model in the evaluation.
        predictor: object with this interface.
        device: device that it computes on.
    """

    multimask = True

    def __init__(self, name: str, predictor: Any, device: torch.device) -> None:
        self.name = name
        self._device = device
        self._predictor = predictor
        self._size = (0, 0)

    def set_image(self, image: LazyImage) -> bool:
        """Pass the image, at the size of its file, to the predictor. See `Predictor.set_image`."""
        image_HWC = image.pixels().copy()
        self._size = image_HWC.shape[0], image_HWC.shape[1]
        with self._named("set_image"):
            self._predictor.set_image(image_HWC)
        return True

    def predict(self, prompts: Prompts, multimask_output: bool) -> list[PredictedMasks]:
        """See `Predictor.predict`; prompts are predicted one by one.

        Raises:
            VerifyError: the predictor raises an exception, or returns masks or scores of another shape.
        """
        predicted = []
        points_PN2, labels_PN, boxes_P4 = as_arrays(prompts)
        for index in range(len(prompts)):
            with self._named("predict"):
                masks, scores, *_ = self._predictor.predict(
                    point_coords=None if points_PN2 is None else points_PN2[index],
                    point_labels=None if labels_PN is None else labels_PN[index],
                    box=None if boxes_P4 is None else boxes_P4[index],
                    multimask_output=multimask_output,
                )
            predicted.append(self._checked(np.asarray(masks), np.asarray(scores, dtype=np.float64)))
        return predicted

    def cost(self) -> Cost:
        """Time both calls with a grey image of 1024 x 1024 pixels. See `Predictor.cost`."""
        image_HWC = np.full((1024, 1024, 3), 128, dtype=np.uint8)
        point = {"point_coords": np.array([[512.0, 512.0]]), "point_labels": np.array([1]), "box": None}
        with self._named("set_image"):
            image_seconds = median_seconds(
                lambda: self._predictor.set_image(image_HWC), self._device, TIMING_SECONDS
            )
        with self._named("predict"):
            prompt_seconds = median_seconds(
                lambda: self._predictor.predict(**point, multimask_output=False), self._device, TIMING_SECONDS
            )
        model = getattr(self._predictor, "model", None)
        parameters = sum(p.numel() for p in model.parameters()) if isinstance(model, nn.Module) else None
        return Cost(parameters=parameters, encoder_ms=1000 * image_seconds, decoder_ms=1000 * prompt_seconds)

    def _checked(self, masks: npt.NDArray, scores: Floats) -> PredictedMasks:
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
        masks_THW = torch.from_numpy(np.ascontiguousarray(masks.astype(bool)))
        return PredictedMasks(masks_THW=masks_THW, scores_T=scores)

    def _named(self, call: str) -> AbstractContextManager[None]:
        return named(f"{self.name}'s {call}")


def as_arrays(
    prompts: Prompts,
) -> tuple[Floats | None, npt.NDArray[np.int64] | None, Floats | None]:
    """Return points (P, N, 2), labels (P, N) and boxes (P, 4) as numpy arrays; None for absent ones."""
    points_PN2, labels_PN = prompts.points_PN2.numpy(), prompts.labels_PN.numpy()
    boxes_P4 = None if prompts.boxes_P4 is None else prompts.boxes_P4.numpy()
    return (points_PN2, labels_PN, boxes_P4) if points_PN2.shape[1] else (None, None, boxes_P4)


@contextmanager
def named(what: str) -> Iterator[None]:
    """Turn any exception of another package's code into a VerifyError that names the code as `what`."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise VerifyError(f"{what} failed with {type(error).__name__}: {reason}") from error


def open_fastsam(name: str, file: Path, device: torch.device) -> FastSamPredictor:
    """Open FastSAM's weights with ultralytics.

    They are a pickle, which can run code: open only files that you trust. Checking it is left to ultralytics.

    Args:
        name: name of the model in the evaluation.
        file: FastSAM's weights, such as FastSAM-s.pt.
        device: device of the model.

    Raises:
        VerifyError: ultralytics isn't installed, there is no such file, or ultralytics can't open it.
    """
    if missing_packages([PACKAGE]):
        raise VerifyError(
            f"--model {name}: FastSAM runs through {PACKAGE} (licence {LICENCE}), which is not installed: "
            "pip install 'mobilesam[fastsam]'"
        )
    if not file.is_file():  # else it would be downloaded
        raise VerifyError(
            f"--model {name}: there is no file {file}; give FastSAM's weights, such as FastSAM-s.pt"
        )
    # By default ultralytics installs missing packages and sends usage statistics.
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("YOLO_OFFLINE", "true")
    with named(f"--model {name}: {PACKAGE}"), _stdout_to_stderr():
        from ultralytics import FastSAM

        return FastSamPredictor(name, FastSAM(str(file)), device)


class FastSamPredictor:
    """Model of ultralytics' class FastSAM.

    It has no decoder for prompts: it segments everything once, and ultralytics' own prompting then selects masks. For
    points it is the union of the masks that contain a foreground point and no background point, for a box the mask
    with the highest IoU with the box.

    Args:
        name: name of the model in the evaluation.
        model: object of ultralytics' class FastSAM.
        device: device that it computes on.
    """

    multimask = False

    def __init__(self, name: str, model: Any, device: torch.device) -> None:
        self.name = name
        self._model = model
        self._device = device
        self._everything: Any = None
        self._size = (0, 0)

    def set_image(self, image: LazyImage) -> bool:
        """Segment everything in the image, at the size of its file. See `Predictor.set_image`."""
        image_HWC = image.pixels()
        self._size = image_HWC.shape[0], image_HWC.shape[1]
        self._everything = self._segment(image_HWC)
        return True

    def predict(self, prompts: Prompts, multimask_output: bool) -> list[PredictedMasks]:
        """See `Predictor.predict`; the mask is the union of the masks that ultralytics' prompting selects."""
        assert not multimask_output, "there is one mask"
        return [self._one_prompt(prompts.take(slice(index, index + 1))) for index in range(len(prompts))]

    def _one_prompt(self, prompt: Prompts) -> PredictedMasks:
        asked: dict[str, Any] = {}
        points_1N2, labels_1N, boxes_14 = as_arrays(prompt)
        if points_1N2 is not None and labels_1N is not None:
            # ultralytics takes indices of pixels: 0.9 is pixel 0.
            asked = {"points": points_1N2[0].astype(np.int64), "labels": labels_1N[0]}
        elif boxes_14 is not None:
            asked = {"bboxes": boxes_14[0]}
        with named(f"{self.name}'s prompt"), _stdout_to_stderr():
            (result,) = self._model.predictor.prompt(self._everything, **asked)
        mask_HW = torch.zeros(self._size, dtype=torch.bool)
        if result.masks is not None and len(result.masks.data):
            mask_HW = result.masks.data.bool().any(dim=0).cpu()
        if mask_HW.shape != self._size:
            raise VerifyError(
                f"{self.name} gave a mask of {tuple(mask_HW.shape)} for an image of {self._size}"
            )
        return PredictedMasks(masks_THW=mask_HW[None], scores_T=np.ones(1))

    def cost(self) -> Cost:
        """Count parameters; time segmenting everything in 1024 x 1024 pixels. See `Predictor.cost`."""
        image_HWC = np.full((1024, 1024, 3), 128, dtype=np.uint8)
        seconds = median_seconds(lambda: self._segment(image_HWC), self._device, TIMING_SECONDS)
        parameters = sum(parameter.numel() for parameter in self._model.model.parameters())
        return Cost(parameters=parameters, encoder_ms=1000 * seconds)

    def _segment(self, image_HWC: np.ndarray) -> Any:
        # ultralytics takes arrays for BGR.
        source = np.ascontiguousarray(image_HWC[..., ::-1])
        with named(f"{self.name}'s predict"), _stdout_to_stderr():
            return self._model.predict(source=source, device=str(self._device), **FASTSAM_SETTINGS)[0]


def _stdout_to_stderr() -> contextlib.AbstractContextManager[Any]:
    """Redirect ultralytics' log to standard error, since standard output is for results."""
    return contextlib.redirect_stdout(sys.stderr)
