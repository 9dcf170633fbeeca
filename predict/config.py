"""What a segmentation is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import PredictError as PredictError
from .overlay import FORMATS
from .prompts import Box, ImagePrompts, Point

MAX_IMAGE_SIZE = 16384


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """All options of one segmentation, checked where they are made.

    `student` is a run's or an export's folder, a student's file, or a file in mobile_sam.pt's format; without it and
    without `teacher` the run that started last (runs/latest) is meant. `head` is a store or a file that holds SAM's
    prompt encoder and mask decoder, where the student lies without them. `teacher` with its `checkpoint` takes a
    student's place. `image_size` in pixels is for teachers and files in mobile_sam.pt's format, which don't say
    (1024 where None). The prompts are those of `ImagePrompts`.

    `out` is the picture to draw, PNG or JPEG by its name; `masks` a folder for one PNG a mask; `rle` a file for the
    masks in SA-1B's JSON layout.

    Raises PredictError when a value is outside its range, or options contradict each other.
    """

    image: Path
    student: Path | None = None
    head: Path | None = None
    teacher: str | None = None
    checkpoint: Path | None = None
    points: Sequence[Point] = ()
    negative_points: Sequence[Point] = ()
    boxes: Sequence[Box] = ()
    everything: bool = False
    out: Path = Path("overlay.png")
    masks: Path | None = None
    rle: Path | None = None
    device: str = "auto"
    image_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("image", "student", "head", "checkpoint", "out", "masks", "rle"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Path(value))
        self._check_model()
        _require(
            self.out.suffix.lower() in FORMATS,
            f"--out {self.out} is neither PNG nor JPEG: end its name in {', '.join(FORMATS)}",
        )
        self._check_places()
        _ = self.prompts  # made, and so checked

    @property
    def prompts(self) -> ImagePrompts:
        """What is to be segmented."""
        return ImagePrompts(
            points=self.points,
            negative_points=self.negative_points,
            boxes=self.boxes,
            everything=self.everything,
        )

    def _check_model(self) -> None:
        _require(
            self.student is None or self.teacher is None,
            f"--student {self.student} and --teacher {self.teacher}: one of them makes the masks",
        )
        _require(
            self.checkpoint is None or self.teacher is not None,
            f"--checkpoint {self.checkpoint} is a teacher's: give --teacher with it, or --student alone",
        )
        _require(
            self.head is None or self.teacher is None,
            f"--head {self.head} goes with a student: the teacher {self.teacher} has its own",
        )
        size = self.image_size
        _require(
            size is None or (64 <= size <= MAX_IMAGE_SIZE and size % 16 == 0),
            f"--image-size {size} is not a multiple of 16 from 64 to {MAX_IMAGE_SIZE}",
        )

    def _check_places(self) -> None:
        """What is read must not be written over, nor one output by another."""
        taken = {
            "the image": self.image,
            "--student": self.student,
            "--head": self.head,
            "--checkpoint": self.checkpoint,
        }
        for option, path in (("--out", self.out), ("--rle", self.rle), ("--masks", self.masks)):
            if path is None:
                continue
            for other, place in taken.items():
                if place is not None and path.resolve() == place.resolve():
                    raise PredictError(f"{option} {path} is {other} itself: give another name")
            taken[option] = path
        for option, path in (("--out", self.out), ("--rle", self.rle)):
            _require(
                path is None or self.masks is None or path.resolve().parent != self.masks.resolve(),
                f"{option} {path} is in --masks {self.masks}, which holds masks alone: give another folder",
            )


def _require(good: bool, message: str) -> None:
    if not good:
        raise PredictError(message)
