"""Options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...common.config import (
    checkpoint_option,
    device_option,
    head_option,
    label_masks_option,
    option,
    paths_from_text,
    require,
    require_image_size,
)
from ...common.errors import VerifyError, shown
from ...sam.registry import is_teacher, teacher_option
from ..config import MOST_POINTS

SPLITS = ("auto", "val", "all")
MAX_IMAGE_SIZE = 4096
DEFAULT_IMAGE_SIZE = 1024
DISTANCES = (100, 200, 300, 400, 500)
"""Default distances in pixels between the two points of a pair, from the MobileSAM paper's comparison with FastSAM
(Table 6)."""


def _name_and_file(texts: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((name, file) for name, _, file in (text.partition("=") for text in texts))


def _pixels(text: str) -> tuple[int, ...]:
    try:
        return () if text == "none" else tuple(map(int, text.split(",")))
    except ValueError:
        raise ValueError("give pixels, such as 100,200, or none") from None


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """All options of one evaluation, checked on construction.

    The images are those of `store`, which also has the teacher's embeddings, or those of `images`. Masks are
    compared with the teacher's for points and pairs of points, and with labels for objects. `split` "auto" is "val"
    if one of the models is a run trained on the store, else "all".

    Raises:
        VerifyError: a value is outside its range, or options contradict each other.
    """

    models: tuple[tuple[str, str], ...] = option(
        (),
        flag="--model",
        metavar="NAME=FILE",
        parse=_name_and_file,
        help="Model to compare; may be repeated. FILE is a run, an export, a student file, mobile_sam.pt, a "
        "checkpoint of SAM's or SAM-HQ's ViTs, or vit_nano. fastsam:FILE (or the name fastsam) is FastSAM "
        "through ultralytics, whose licence is AGPL-3.0; PREDICTOR:FILE is for packages with an entry point in "
        "mobilesam.predictors.",
    )
    store: Path | None = option(None, help="Store with the images and the teacher's embeddings.")
    images: Path | None = option(
        None,
        metavar="DIR|TAR",
        help="Images to evaluate, without --store; with it, the folder that holds the store's images now.",
    )
    teacher: str | None = teacher_option(
        "Teacher to run on --images; NAME is of another package, help lists all."
    )
    checkpoint: Path | None = checkpoint_option()
    coco: Path | None = option(
        None,
        metavar="FILE.json",
        help="COCO instances file with the labels [default: SA-1B's JSON beside each image]",
    )
    label_masks: Path | None = label_masks_option()
    points: int = option(
        4,
        metavar="N",
        help="Compare with the teacher's masks for N x N points in each image; 0 skips this comparison.",
    )
    distances: tuple[int, ...] = option(
        DISTANCES,
        metavar="PX,PX,...",
        parse=_pixels,
        text=",".join(map(str, DISTANCES)),
        help="Distances in pixels between a foreground and a background point; none skips pairs.",
    )
    max_objects: int = option(
        64, metavar="N", help="Evaluate at most this many labelled objects per image, sampled at random."
    )
    split: str = option(
        "auto",
        choices=SPLITS,
        help="Rows of the store to evaluate: val are those that no run among the models was trained on; auto is val "
        "if there is such a run, else all.",
    )
    limit: int | None = option(None, metavar="N", help="Evaluate at most this many images.")
    seed: int = option(0, help="Seed of the directions of point pairs and of the sampled objects.")
    image_size: int | None = option(
        None,
        metavar="PX",
        help="Side of the encoder's input in pixels, for files that don't record it "
        "[default: the store's, else 1024]",
    )
    device: str = device_option()
    report: Path | None = option(
        None, metavar="FILE.html", help="Write one self-contained page with all models' masks side by side."
    )

    head: Path | None = head_option()

    def __post_init__(self) -> None:
        paths_from_text(self, "store", "images", "checkpoint", "coco", "label_masks", "report", "head")
        self._check_models()
        self._check_sources()
        self._require(
            0 <= self.points <= MOST_POINTS, f"--points {self.points} is not between 0 and {MOST_POINTS}"
        )
        self._require(
            all(d >= 1 for d in self.distances), f"--distances {self.distances}: give pixels, at least 1"
        )
        self._require(
            len(set(self.distances)) == len(self.distances),
            f"--distances {self.distances}: a distance is repeated; give each once",
        )
        for name, number in (("--max-objects", self.max_objects), ("--limit", self.limit)):
            self._require(number is None or number >= 1, f"{name} {number} is not at least 1")
        self._require(0 <= self.seed < 2**63, f"--seed {self.seed} is not 0 or more")
        self._require(self.split in SPLITS, f"--split {self.split!r} is none of {', '.join(SPLITS)}")
        require_image_size(self.image_size, VerifyError, MAX_IMAGE_SIZE)

    def _require(self, good: bool, message: str) -> None:
        require(good, message, VerifyError)

    def _check_models(self) -> None:
        self._require(bool(self.models), "give at least one --model NAME=FILE")
        names = [name for name, _ in self.models]
        for name, file in self.models:
            self._require(bool(name and file), f"--model {shown(name)}={shown(file)}: give NAME=FILE")
            self._require(
                names.count(name) == 1, f"--model: {names.count(name)} models are named {shown(name)}"
            )

    def _check_sources(self) -> None:
        self._require(
            self.store is not None or self.images is not None,
            "no images to evaluate: give --store STORE or --images DIR",
        )
        self._require(
            self.teacher is None or is_teacher(self.teacher), f"--teacher: there is no {self.teacher!r}"
        )
        self._require(
            self.store is None or self.teacher is None,
            "--store has its teacher's embeddings, so --teacher has nothing to do: leave out one of them",
        )
        self._require(
            self.coco is None or self.label_masks is None,
            "--coco and --label-masks are two sources of labels: leave out one of them",
        )
        self._require(
            self.teacher is not None or self.checkpoint is None,
            "--checkpoint is a teacher's: give --teacher NAME",
        )
        self._require(
            self.store is not None or self.split != "val",
            "--split val is of a store's rows: give --store, or --split all",
        )
