"""Options of a segmentation and of an export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.config import (
    checkpoint_option,
    device_option,
    option,
    paths_from_text,
    require,
    require_image_size,
)
from ..common.errors import PredictError as PredictError
from ..common.errors import shown
from ..sam.registry import TEACHERS, teacher_option

if TYPE_CHECKING:
    from .prompts import ImagePrompts

MAX_IMAGE_SIZE = 16384
"""Largest side of the encoder's input in pixels."""

TORCH, ENCODER, DECODER, FOLDER, WEB = "torch", "encoder", "decoder", "folder", "web"
"""Kinds of exports."""
TORCH_SUFFIXES = (".pt", ".pth")


def _student_option() -> Any:
    return option(
        None,
        metavar="RUN_OR_FILE",
        help="Run, export, student file, or file in mobile_sam.pt's format [default: runs/latest]",
    )


def _head_option() -> Any:
    return option(
        None,
        metavar="STORE_OR_FILE",
        help="Store or file with SAM's prompt encoder and mask decoder, if the student's file has none.",
    )


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """All options of one segmentation, checked on construction.

    Points (x, y) and boxes (x0, y0, x1, y1) are those of `ImagePrompts`. Points and a single box mean one object.

    Raises:
        PredictError: a value is outside its range, or options contradict each other.
    """

    image: Path = option(flag="image", help="Image to segment.")
    student: Path | None = _student_option()
    head: Path | None = _head_option()
    teacher: str | None = teacher_option(
        "Segment with this teacher instead of a student; NAME is of another package, help lists all."
    )
    checkpoint: Path | None = checkpoint_option()
    points: Sequence[tuple[float, float]] = option(
        (),
        flag="--point",
        metavar="X Y",
        help="Point on the object, in pixels of the image; may be repeated.",
    )
    negative_points: Sequence[tuple[float, float]] = option(
        (),
        flag="--negative-point",
        metavar="X Y",
        help="Point outside the object, in pixels of the image; may be repeated.",
    )
    boxes: Sequence[tuple[float, float, float, float]] = option(
        (),
        flag="--box",
        metavar="X0 Y0 X1 Y1",
        help="Box around the object, in pixels of the image; several boxes are one object each.",
    )
    everything: bool = option(False, help="Segment everything that SAM's automatic mask generator finds.")
    out: Path = option(
        Path("overlay.png"), metavar="FILE", help="Picture to write, the masks drawn into it; PNG or JPEG."
    )
    masks: Path | None = option(
        None, metavar="DIR", help="Folder for one PNG per mask, 255 on the object and 0 elsewhere."
    )
    rle: Path | None = option(
        None, metavar="FILE", help="JSON file for the masks in SA-1B's layout, COCO's run-length encoding."
    )
    device: str = device_option()
    image_size: int | None = option(
        None,
        metavar="PX",
        help="Side of the encoder's input in pixels, for teachers and files that don't record it [default: 1024]",
    )

    def __post_init__(self) -> None:
        from .overlay import FORMATS  # numpy and PIL, which --help does without

        paths_from_text(self, "image", "student", "head", "checkpoint", "out", "masks", "rle")
        self._check_model()
        self._require(
            self.out.suffix.lower() in FORMATS,
            f"--out {self.out} is neither PNG nor JPEG: end its name in {', '.join(FORMATS)}",
        )
        self._check_places()
        _ = self.prompts  # checked on construction

    @property
    def prompts(self) -> ImagePrompts:
        """All prompts of the request."""
        from .prompts import ImagePrompts

        return ImagePrompts(
            points=self.points,
            negative_points=self.negative_points,
            boxes=self.boxes,
            everything=self.everything,
        )

    def _require(self, good: bool, message: str) -> None:
        require(good, message, PredictError)

    def _check_model(self) -> None:
        self._require(
            self.student is None or self.teacher is None,
            f"--student {self.student} and --teacher {self.teacher} exclude each other: give one of them",
        )
        self._require(
            self.checkpoint is None or self.teacher is not None,
            f"--checkpoint {self.checkpoint} is a teacher's: give --teacher with it, or --student alone",
        )
        self._require(
            self.head is None or self.teacher not in TEACHERS,
            f"--head {self.head} goes with a student: the teacher {self.teacher} has its own",
        )
        require_image_size(self.image_size, PredictError, MAX_IMAGE_SIZE)

    def _check_places(self) -> None:
        """Refuse to overwrite an input, or to write two outputs to one path."""
        taken = {
            "the image": self.image,
            "--student": self.student,
            "--head": self.head,
            "--checkpoint": self.checkpoint,
        }
        for name, path in (("--out", self.out), ("--rle", self.rle), ("--masks", self.masks)):
            if path is None:
                continue
            for other, place in taken.items():
                same = place is not None and path.resolve() == place.resolve()
                self._require(not same, f"{name} {path} is {other} itself: give another name")
            taken[name] = path
        for name, path in (("--out", self.out), ("--rle", self.rle)):
            self._require(
                path is None or self.masks is None or path.resolve().parent != self.masks.resolve(),
                f"{name} {path} is in --masks {self.masks}, which holds only masks: give another folder",
            )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """All options of one export, checked on construction.

    The name of `out` determines the kind of export: `.pt` or `.pth` is student and head in mobile_sam.pt's format,
    `...encoder.onnx` and `...decoder.onnx` are the two halves for onnxruntime; a name without a suffix, or an
    existing folder, is all of them with a model card.

    Raises:
        PredictError: `out` is none of these or an input file, or the image size is out of range.
    """

    student: Path | None = _student_option()
    head: Path | None = _head_option()
    out: Path = option(
        metavar="X.pt|encoder.onnx|decoder.onnx|DIR",
        help="File to make, its kind chosen by its name; a folder gets all. Only an earlier export is replaced.",
    )
    image_size: int | None = option(
        None,
        metavar="PX",
        help="Side of the encoder's input in pixels, for files that don't record it [default: 1024; web: 512]",
    )
    format: str | None = option(
        None,
        choices=(WEB,),
        help="Kind of export; web is a folder with a page that segments photos in the browser [default: by --out]",
    )
    runtime_dir: Path | None = option(
        None,
        metavar="DIR",
        help="Folder with onnxruntime-web's files, for web [default: its npm package, downloaded once]",
    )
    examples: Sequence[Path] = option(
        (), metavar="FILE", help="Photo that the web page offers; may be repeated [default: a drawn one]"
    )

    def __post_init__(self) -> None:
        paths_from_text(self, "out", "student", "head", "runtime_dir")
        object.__setattr__(self, "examples", tuple(map(Path, self.examples)))
        for name, given in (("--runtime-dir", self.runtime_dir), ("--examples", self.examples)):
            require(not given or self.format == WEB, f"{name} goes with --format web", PredictError)
        require_image_size(self.image_size, PredictError, MAX_IMAGE_SIZE)
        _ = self.kind  # checked on construction
        for name, path in (("--student", self.student), ("--head", self.head)):
            same = path is not None and path.resolve() == self.out.resolve()
            require(not same, f"--out {self.out} is {name} itself: give another name", PredictError)

    @property
    def kind(self) -> str:
        """Kind of export that `format` and `out` ask for: torch, encoder, decoder, folder or web."""
        if self.format == WEB:
            return WEB
        name = self.out.name.lower()
        if self.out.is_dir() or not self.out.suffix:
            return FOLDER
        if name.endswith(TORCH_SUFFIXES):
            return TORCH
        for kind in (ENCODER, DECODER):
            if name.endswith(f"{kind}.onnx"):
                return kind
        if name.endswith(".onnx"):
            raise PredictError(
                f"--out {shown(str(self.out))}: which half? SAM's ONNX files are two: give a name that ends in "
                "encoder.onnx or in decoder.onnx, or a folder for both"
            )
        raise PredictError(
            f"--out {shown(str(self.out))}: give a name that ends in .pt, encoder.onnx or decoder.onnx, or a folder, "
            "for all of them"
        )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """All options of the server of a web demo, checked on construction.

    Raises:
        PredictError: the port is out of range.
    """

    port: int | None = option(
        None, metavar="PORT", help="Port of the server [default: 8000, another one if that is taken]"
    )
    folder: Path = Path("demo")
    """Folder that `export --format web` wrote."""

    def __post_init__(self) -> None:
        paths_from_text(self, "folder")
        require(
            self.port is None or 1 <= self.port <= 65535,
            f"--port {self.port} must be from 1 to 65535",
            PredictError,
        )
