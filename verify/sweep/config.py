"""Options of a sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from ...common.config import Option, label_masks_option, must_be, option, require
from ...common.errors import VerifyError
from ...distill.config import AUTO, DistillConfig
from ..config import MOST_POINTS


def _value_types(*names: str) -> Mapping[str, type]:
    """Return the types of these options of distill; for an optional one, the type other than None."""
    hints = get_type_hints(DistillConfig)
    return MappingProxyType({name: (*get_args(hints[name]), hints[name])[0] for name in names})


AXES = _value_types(
    "seed", "student", "student_size", "init", "objective", "labels", "objects", "rounds", "boxes", "mse_weight",
    "focal_weight", "dice_weight", "iou_weight", "recipe", "lr", "weight_decay", "warmup", "loss", "loss_region",
    "batch_size", "epochs",
)  # fmt: skip
"""Types of the options of distill that may have several values in a sweep. The first varies slowest: all combinations
of one seed come before those of the next, so that a sweep is useful before it ends."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """All options of one sweep, checked on construction.

    Every combination of the axes' values is a run. Masks are compared on the held-out rows and, if `test_store` is
    given, on all of its rows. Paths are made absolute, since a worker may run in another folder.

    Raises:
        VerifyError: a value is outside its range, or options contradict each other.
    """

    base: DistillConfig = field(default_factory=DistillConfig)
    """Options that all runs share; its `out` and `restart` have no effect."""
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of options of distill, by name; only those of `AXES`."""
    iterations: tuple[int, ...] = ()
    """Numbers of optimizer steps, in place of the axis `epochs`; each run gets the nearest number of epochs."""
    points: int = option(4, metavar="N", help="Compare the masks of N x N points in each image.")
    test_store: Path | None = option(
        None, metavar="STORE", help="Also test the students on all images of this store."
    )
    test_images: Path | None = option(
        None, metavar="DIR", help="Folder that holds the images of --test-store now, if they moved."
    )
    coco: Path | None = option(
        None,
        metavar="FILE.json",
        help="COCO instances file with the labels of the images, for the runs whose objective compares masks.",
    )
    label_masks: Path | None = label_masks_option()
    scheduler: str | None = option(
        None,
        metavar="ADDRESS",
        help="Train on the dask cluster at this address, one run per worker [default: all here, one after another]",
    )
    out: Path = option(
        Path("sweeps/latest"), metavar="sweeps/NAME", help="Folder for runs, results, tables and report."
    )

    def __post_init__(self) -> None:
        for name in ("coco", "label_masks"):
            object.__setattr__(self, name, getattr(self, name) or getattr(self.base, name))
        for name in ("out", "test_store", "test_images", "coco", "label_masks"):
            object.__setattr__(self, name, _absolute(getattr(self, name)))
        places: dict[str, Any] = {
            name: _absolute(getattr(self.base, name)) for name in ("store", "images", "init")
        }
        if self.base.label_source is not None:  # each trial that uses labels gets it again
            places |= {"coco": None, "label_masks": None}
        object.__setattr__(self, "base", dataclasses.replace(self.base, out=None, restart=False, **places))
        _require(self.axes.keys() <= AXES.keys(), "axes", sorted(self.axes), f"some of {', '.join(AXES)}")
        axes = {name: tuple(dict.fromkeys(self.axes[name])) for name in AXES if name in self.axes}
        if "init" in axes:
            axes["init"] = tuple(map(_absolute, axes["init"]))
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "iterations", tuple(dict.fromkeys(self.iterations)))
        for name, values in axes.items():
            _require(len(values) > 0, name, values, "at least one value")
        _require(all(count >= 1 for count in self.iterations), "iterations", self.iterations, "at least 1")
        _require(1 <= self.points <= MOST_POINTS, "points", self.points, f"between 1 and {MOST_POINTS}")
        if self.iterations and "epochs" in axes:
            raise VerifyError("epochs and iterations both set the length of training: give one of them")
        if self.coco is not None and self.label_masks is not None:
            raise VerifyError("coco and label masks are two sources of labels: leave out one of them")
        if self.test_images is not None and self.test_store is None:
            raise VerifyError("test images belong to a test store, and none is given: give --test-store too")


def parse_axis(name: str, text: str) -> tuple[Any, ...]:
    """Parse the values of an axis.

    Args:
        name: name of the axis, or "iterations".
        text: values separated by commas.

    Raises:
        VerifyError: one of them isn't a value of the axis.
    """
    kind = AXES.get(name, int)
    words = (AUTO,) if name == "epochs" else ()
    try:
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise ValueError
        return tuple(part if part in words else kind(part) for part in parts)
    except ValueError:
        also = "".join(f" or {word}" for word in words)
        raise VerifyError(must_be(name, text, f"{kind.__name__} values{also} with commas between")) from None


def _axis_options(*names: str) -> Mapping[str, Option]:
    """Return the command-line options of these axes: those of distill, but for several values."""
    fields = {field.name: field for field in dataclasses.fields(DistillConfig)}
    options = {}
    for name in names:
        field = fields["epochs" if name == "iterations" else name]
        described = field.metadata["option"]
        default = "" if field.default is None else f" [default: {field.default}]"
        text = described.help + default
        if name == "iterations":
            text = "Numbers of optimizer steps, in place of --epochs; each run gets the nearest number of epochs."
        options[name] = dataclasses.replace(
            described, help=text, metavar="V,...", choices=(), parse=partial(parse_axis, name), text=None
        )
    return MappingProxyType(options)


AXIS_OPTIONS = _axis_options(
    "student", "student_size", "init", "objective", "batch_size", "epochs", "iterations", "recipe", "lr",
    "weight_decay", "warmup", "loss", "loss_region", "labels", "objects", "rounds", "boxes", "mse_weight",
    "focal_weight", "dice_weight", "iou_weight", "seed",
)  # fmt: skip
"""Options of `mobilesam sweep` that take several values, in the order of its help."""


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else Path(path).absolute()


def _require(good: bool, name: str, value: object, wanted: str) -> None:
    require(good, must_be(name, value, wanted), VerifyError)
