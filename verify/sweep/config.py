"""What a sweep is asked to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...common.errors import VerifyError
from ...distill.config import DistillConfig
from ..config import MOST_POINTS

AXES: Mapping[str, type] = MappingProxyType(
    {
        "seed": int,
        "student": str,
        "init": Path,
        "objective": str,
        "labels": str,
        "objects": int,
        "rounds": int,
        "boxes": float,
        "mse_weight": float,
        "focal_weight": float,
        "dice_weight": float,
        "iou_weight": float,
        "lr": float,
        "weight_decay": float,
        "warmup": float,
        "loss_region": str,
        "batch_size": int,
        "epochs": int,
    }
)
"""The options of distill that may have several values in a sweep, with the type of a value. The first varies slowest:
all combinations of one seed come before those of the next, so that a sweep is of use before it ends."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """All options of one sweep, checked where they are made.

    `base` is what all runs have in common; `axes` gives fields of it, those of AXES, the values that they take, and
    every combination is a run. `iterations`, in place of the axis `epochs`, are numbers of optimizer steps: each run
    gets the number of epochs that comes nearest. Runs, results and tables go to `out`. Masks are compared for
    `points` x `points` prompts an image, on the held-out rows and, where `test_store` is given, on all of its rows,
    whose images are at `test_images` if they moved. `scheduler` is the address of a dask cluster; None runs one after
    another here. Paths are made absolute: a worker may run in another folder.

    Raises VerifyError when a value is outside its range.
    """

    out: Path
    base: DistillConfig = field(default_factory=DistillConfig)
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    iterations: tuple[int, ...] = ()
    test_store: Path | None = None
    test_images: Path | None = None
    points: int = 4
    scheduler: str | None = None

    def __post_init__(self) -> None:
        for name in ("out", "test_store", "test_images"):
            object.__setattr__(self, name, _absolute(getattr(self, name)))
        places: dict[str, Any] = {
            name: _absolute(getattr(self.base, name)) for name in ("store", "images", "init")
        }
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
            raise VerifyError("epochs and iterations both say how long to train: give one of them")
        if self.test_images is not None and self.test_store is None:
            raise VerifyError("test images belong to a test store, and none is given")


def parse_axis(name: str, text: str) -> tuple[Any, ...]:
    """The values of an axis, or of "iterations", as a command line has them: with commas between.

    Raises VerifyError naming the one that isn't a value of that axis.
    """
    kind = AXES.get(name, int)
    values = []
    for part in text.split(","):
        try:
            if not part.strip():
                raise ValueError
            values.append(kind(part.strip()))
        except ValueError:
            raise VerifyError(
                f"{name.replace('_', ' ')} must be {kind.__name__} values with commas between; it is {text!r}"
            ) from None
    return tuple(values)


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else Path(path).absolute()


def _require(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise VerifyError(f"{name.replace('_', ' ')} must be {wanted}; it is {value!r}")
