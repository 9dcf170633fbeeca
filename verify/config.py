"""Options of a verification."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..common.config import (
    AUTO_PRECISIONS,
    device_option,
    head_option,
    moved_images_option,
    must_be,
    option,
    paths_from_text,
    precision_option,
    require,
)

# For `mobilesam.verify`, whose stub can only name modules of this room.
from ..common.errors import ReportError as ReportError
from ..common.errors import VerifyError as VerifyError

SPLITS = ("val", "train", "all")
MOST_POINTS = 64
"""Largest number of points in each direction: more than 4,096 prompts per image are taken for a mistake."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """All options of one verification, checked on construction.

    In `precision` float32 a student that is its teacher has a skill and a mean IoU of 1; with "auto", the precision
    of training, the numbers agree with the trainer's. The thresholds apply to the headline metrics: mean cosine and
    skill over valid cells, and the mean IoU of masks.

    Raises:
        VerifyError: a value is outside its range, or options contradict each other.
    """

    student: Path | None = option(
        None, metavar="RUN_OR_FILE", help="Run or student file to verify [default: runs/latest]"
    )
    store: Path | None = option(None, help="Store to compare with [default: the run's]")
    images: Path | None = moved_images_option()
    split: str = option(
        "val", choices=SPLITS, help="Rows of the store to compare: held out, trained on, or all."
    )
    precision: str = precision_option(
        "Precision of the student's arithmetic; auto is the one it was trained in.", default="float32"
    )
    device: str = device_option()
    batch_size: int | None = option(None, metavar="B", help="Images per batch [default: by device]")
    report: Path | None = option(
        None, metavar="FILE.html", help="Write one self-contained page with curves and pictures."
    )
    min_cosine: float | None = option(None, metavar="X", help="Fail below this mean cosine (valid cells).")
    min_skill: float | None = option(None, metavar="X", help="Fail below this skill (valid cells).")
    min_miou: float | None = option(None, metavar="X", help="Fail below this mean IoU of the masks.")
    points: int = option(
        4, metavar="N", help="Compare the masks of N x N points in each image; 0 compares no masks."
    )

    head: Path | None = head_option()

    def __post_init__(self) -> None:
        paths_from_text(self, "student", "store", "images", "report", "head")
        self._require(self.split in SPLITS, "split", ", ".join(SPLITS))
        self._require(self.precision in AUTO_PRECISIONS, "precision", ", ".join(AUTO_PRECISIONS))
        self._require(self.batch_size is None or self.batch_size >= 1, "batch_size", "at least 1")
        self._require(0 <= self.points <= MOST_POINTS, "points", f"between 0 and {MOST_POINTS}")
        # Comparisons with NaN are false, so NaN is refused too; no metric can exceed 1.
        cosine, skill, miou = self.min_cosine, self.min_skill, self.min_miou
        self._require(cosine is None or -1 <= cosine <= 1, "min_cosine", "between -1 and 1")
        self._require(skill is None or float("-inf") < skill <= 1, "min_skill", "at most 1")
        self._require(miou is None or 0 <= miou <= 1, "min_miou", "between 0 and 1")
        if self.head is not None and self.points == 0:
            raise VerifyError(f"--head {self.head} is for masks, but points is 0: give at least 1")
        if miou is not None and self.points == 0:
            raise VerifyError(f"min miou {miou:g} asks for masks, but points is 0: give at least 1")

    @property
    def thresholds(self) -> dict[str, float | None]:
        """Thresholds by name; None if not set."""
        return {"min_cosine": self.min_cosine, "min_skill": self.min_skill, "min_miou": self.min_miou}

    def _require(self, good: bool, name: str, wanted: str) -> None:
        require(good, must_be(name, getattr(self, name), wanted), VerifyError)
