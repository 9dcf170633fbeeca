"""What an evaluation is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...common.errors import VerifyError, shown
from ...sam.registry import TEACHERS
from ..config import MOST_POINTS
from .prompts import DISTANCES

SPLITS = ("auto", "val", "all")
MAX_IMAGE_SIZE = 4096
DEFAULT_IMAGE_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """All options of one evaluation, checked where they are made.

    `models` are (name, what `Opener.open` takes). The images are those of `store`, which then gives the teacher's
    embeddings too and whose photos lie at `images` if they moved; or, without it, those of the folder or tar
    `images`, on which `teacher` is run, if one is named. Masks are compared with the teacher's for `points` x
    `points` prompts an image (0 leaves that out) and for pairs of points `distances` pixels apart, and with labels
    for up to `max_objects` objects an image: those of the COCO file `coco`, else of the JSON file beside each image.

    `split` of a store's rows: "val" are those that no run among the models was trained on, "auto" is that where there
    is such a run, else all. `limit` is the number of images. `image_size` is for files that don't say theirs (None:
    the store's, else 1024). `report` is an HTML file to write. `seed` draws directions and objects.

    Raises VerifyError when a value is outside its range, or options contradict each other.
    """

    models: tuple[tuple[str, str], ...]
    store: Path | None = None
    images: Path | None = None
    teacher: str | None = None
    checkpoint: Path | None = None
    coco: Path | None = None
    points: int = 4
    distances: tuple[int, ...] = DISTANCES
    max_objects: int = 64
    split: str = "auto"
    limit: int | None = None
    seed: int = 0
    image_size: int | None = None
    device: str = "auto"
    report: Path | None = None

    def __post_init__(self) -> None:
        for name in ("store", "images", "checkpoint", "coco", "report"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Path(value))
        _require(bool(self.models), "give at least one --model NAME=FILE")
        names = [name for name, _ in self.models]
        for name, value in self.models:
            _require(bool(name and value), f"--model {shown(name)}={shown(value)}: give NAME=FILE")
            _require(names.count(name) == 1, f"--model: {names.count(name)} models are named {shown(name)}")
        self._check_sources()
        _require(
            0 <= self.points <= MOST_POINTS, f"--points {self.points} is not between 0 and {MOST_POINTS}"
        )
        _require(
            all(d >= 1 for d in self.distances), f"--distances {self.distances}: give pixels, at least 1"
        )
        _require(
            len(set(self.distances)) == len(self.distances), f"--distances {self.distances}: one comes twice"
        )
        for option, number in (("--max-objects", self.max_objects), ("--limit", self.limit)):
            _require(number is None or number >= 1, f"{option} {number} is not at least 1")
        _require(0 <= self.seed < 2**63, f"--seed {self.seed} is not 0 or more")
        _require(self.split in SPLITS, f"--split {self.split!r} is none of {', '.join(SPLITS)}")
        size = self.image_size
        _require(
            size is None or (64 <= size <= MAX_IMAGE_SIZE and size % 16 == 0),
            f"--image-size {size} is not a multiple of 16 from 64 to {MAX_IMAGE_SIZE}",
        )

    def _check_sources(self) -> None:
        _require(
            self.store is not None or self.images is not None,
            "nothing to look at: give --store STORE or --images DIR",
        )
        _require(self.teacher is None or self.teacher in TEACHERS, f"--teacher: there is no {self.teacher!r}")
        _require(
            self.store is None or self.teacher is None,
            "--store has its teacher's embeddings, so --teacher has nothing to do: leave out one of them",
        )
        _require(
            self.teacher is not None or self.checkpoint is None,
            "--checkpoint is a teacher's: give --teacher NAME",
        )
        _require(
            self.store is not None or self.split != "val",
            "--split val is of a store's rows: give --store, or --split all",
        )


def _require(good: bool, message: str) -> None:
    if not good:
        raise VerifyError(message)
