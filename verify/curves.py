"""What a run logged, as the columns that the report draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Columns of the training lines, and of the validation lines; NaN where a number was undefined."""

    train_step: list[int]
    train_loss: list[float]
    val_epoch: list[int]
    val_step: list[int]
    val_loss: list[float]
    """The mse over the cells that the loss counts, so that it compares with `train_loss`."""
    val_cosine: list[float]
    val_skill: list[float]
    """Over valid cells, as `val_cosine`."""
    loss_region: str


def read_curves(history: Iterable[Mapping[str, Any]], loss_region: str) -> Curves:
    """Sorts the lines of metrics.jsonl into columns."""
    lines = list(history)
    train = [line for line in lines if line["kind"] == "train"]
    val = [line for line in lines if line["kind"] == "val"]
    mse = "mse" if loss_region == "all" else "mse_valid"
    return Curves(
        train_step=[line["step"] for line in train],
        train_loss=[_number(line["loss"]) for line in train],
        val_epoch=[line["epoch"] for line in val],
        val_step=[line["step"] for line in val],
        val_loss=[_number(line[mse]) for line in val],
        val_cosine=[_number(line["cosine_valid"]["mean"]) for line in val],
        val_skill=[_number(line["skill_valid"]) for line in val],
        loss_region=loss_region,
    )


def thin(x: list[int], y: list[float], most: int = 400) -> tuple[list[float], list[float]]:
    """At most `most` points: means of equal runs of neighbours, so that the page stays small."""
    width = -(-len(x) // most)
    if width <= 1:
        return list(x), list(y)
    runs = [slice(start, start + width) for start in range(0, len(x), width)]
    return [_mean(x[run]) for run in runs], [_mean(y[run]) for run in runs]


def _mean(values: list[int] | list[float]) -> float:
    return math.fsum(values) / len(values)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
