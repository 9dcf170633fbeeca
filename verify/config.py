"""What a verification is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..common.errors import ReportError as ReportError
from ..common.errors import VerifyError as VerifyError

SPLITS = ("val", "train", "all")
PRECISIONS = ("auto", "float32", "bfloat16")
MOST_POINTS = 64
"""On a side: more than 4,096 prompts an image are a mistake."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """All options of one verification, checked where they are made.

    `student` is a run's folder or a student.safetensors, None the run that started last (runs/latest); `store`
    and `images` are None where the run's own are meant. `precision` "auto" means what the student was trained
    in, so that the numbers agree with the trainer's. `report` is an HTML file to write. Masks are compared for
    `points` x `points` prompts an image; 0 leaves them out. `min_cosine`, `min_skill` and `min_miou` are thresholds
    on the headline metrics: mean cosine and skill over valid cells, and the masks' mean IoU.

    Raises VerifyError when a value is outside its range.
    """

    student: Path | None = None
    store: Path | None = None
    images: Path | None = None
    split: str = "val"
    precision: str = "auto"
    device: str = "auto"
    batch_size: int | None = None
    report: Path | None = None
    points: int = 4
    min_cosine: float | None = None
    min_skill: float | None = None
    min_miou: float | None = None

    def __post_init__(self) -> None:
        for name in ("student", "store", "images", "report"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Path(value))
        _require(self.split in SPLITS, "split", self.split, ", ".join(SPLITS))
        _require(self.precision in PRECISIONS, "precision", self.precision, ", ".join(PRECISIONS))
        _require(self.batch_size is None or self.batch_size >= 1, "batch size", self.batch_size, "at least 1")
        _require(0 <= self.points <= MOST_POINTS, "points", self.points, f"between 0 and {MOST_POINTS}")
        # Comparisons with NaN are false, so NaN is refused too; none can exceed 1.
        cosine, skill, miou = self.min_cosine, self.min_skill, self.min_miou
        _require(cosine is None or -1 <= cosine <= 1, "min cosine", cosine, "between -1 and 1")
        _require(skill is None or float("-inf") < skill <= 1, "min skill", skill, "at most 1")
        _require(miou is None or 0 <= miou <= 1, "min miou", miou, "between 0 and 1")
        if miou is not None and self.points == 0:
            raise VerifyError(f"min miou {miou:g} asks for masks, but points is 0: give at least 1")

    @property
    def thresholds(self) -> dict[str, float | None]:
        """Threshold name -> value, None where it wasn't set."""
        return {"min_cosine": self.min_cosine, "min_skill": self.min_skill, "min_miou": self.min_miou}


def _require(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise VerifyError(f"{name} must be {wanted}; it is {value!r}")
