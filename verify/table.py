"""Names and definitions of the metrics, and the tables of metrics for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..common.errors import counted, shown
from ..common.table import Table
from .summary import headline
from .thresholds import describe, run_checks


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Metric of a result, with its label, format and definition."""

    label: str
    path: tuple[str, ...]
    """Keys in a result of the value over all cells; with `_valid` appended to the first, of the value over valid
    cells. Metrics of masks have only the former."""
    digits: str
    """Format specification, such as ".4f"."""
    definition: str

    def text(self, result: Mapping[str, Any], *, valid: bool) -> str:
        """Format the metric's value.

        Args:
            result: result of `verify`.
            valid: True for the value over valid cells, False for that over all cells.

        Returns:
            The value as text; "undefined" if it is None or NaN.
        """
        first, *rest = self.path
        value = result[f"{first}_valid" if valid else first]
        for part in rest:
            value = None if value is None else value[part]
        return number(value, self.digits)


def number(value: float | None, digits: str) -> str:
    """Format a number.

    Args:
        value: the number.
        digits: format specification, such as ".4f".

    Returns:
        The number as text; "undefined" for None or NaN.
    """
    return "undefined" if value is None or value != value else format(value, digits)


METRICS = (
    Metric(
        label="skill",
        path=("skill",),
        digits=".4f",
        definition="1 - mse / mse of always predicting the training rows' mean embedding: 0 is a constant, "
        "1 is the teacher.",
    ),
    Metric(
        label="cosine, mean",
        path=("cosine", "mean"),
        digits=".4f",
        definition="Cosine over the 256 channels at each cell, averaged over an image's cells; mean over images.",
    ),
    Metric(
        label="cosine, 5th percentile",
        path=("cosine", "p5"),
        digits=".4f",
        definition="The same cosine per image: 5% of the images lie below this.",
    ),
    Metric(
        label="cosine, minimum",
        path=("cosine", "min"),
        digits=".4f",
        definition="The same cosine per image: the worst image.",
    ),
    Metric(
        label="mse",
        path=("mse",),
        digits="#.4g",
        definition="Squared difference of student and teacher, mean over all elements.",
    ),
    Metric(
        label="relative mse",
        path=("relative_mse",),
        digits="#.4g",
        definition="sum (s - t)² / sum (t - m)², with m the teacher's mean per channel over the same rows.",
    ),
)


MASK_METRICS = (
    Metric(
        label="mIoU",
        path=("miou",),
        digits=".4f",
        definition="Intersection over union of student's and teacher's mask for the same point, both through the "
        "store's head (the student's through its own, where one was trained with it), at the image's own "
        "resolution; mean over an image's points, then over images.",
    ),
    Metric(
        label="mIoU, minimum",
        path=("miou_min",),
        digits=".4f",
        definition="The same mean over points: the worst image.",
    ),
    Metric(
        label="mIoU of a constant",
        path=("miou_constant",),
        digits=".4f",
        definition="The same as mIoU for the embedding that skill compares with, the training rows' mean: its masks "
        "know nothing of the image.",
    ),
)


def masks_compared(result: Mapping[str, Any]) -> str:
    """Describe the prompts and the empty masks of a result of `verify`; "" if no masks were compared."""
    if "miou" not in result:
        return ""
    side = round(result["prompts"] ** 0.5)
    prompts, empty = result["prompts"] * result["images"], result["empty_masks"]
    text = f"{side} x {side} point{'' if side == 1 else 's'} an image"
    if empty["teacher"] or empty["student"]:
        text += f"; empty masks: teacher {empty['teacher']:,}, student {empty['student']:,} of {prompts:,}"
    return text


def table_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the lines that `mobilesam verify` prints: student and teacher, notes, metrics, checks, the summary.

    Args:
        result: result of `verify`.
    """
    subject: Mapping[str, Any] = result["subject"]
    images = counted(result["images"], "image")
    lines = [f"{subject['student']} against {subject['teacher']}, split {subject['split']}: {images}"]
    lines += [f"note: {note}" for note in subject["notes"]]
    for table in _tables(result):
        lines += ["", *table.lines()]
    lines.append("")
    lines += [f"FAILED  {describe(check)}" for check in result["failed_checks"]]
    checks = run_checks(result, subject["thresholds"])
    lines += [f"passed  {describe(check)}" for check in checks if check["passed"]]
    if not checks:
        lines.append("no thresholds set (--min-cosine, --min-skill, --min-miou)")
    if subject["report"]:
        lines.append(f"report  {subject['report']}")
    lines.append(headline(result))
    return [shown(line) for line in lines]


def _tables(result: Mapping[str, Any]) -> list[Table]:
    tables = [
        Table(
            title="embeddings",
            columns=["metric", "valid cells", "all cells"],
            numeric=[False, True, True],
            rows=[
                [metric.label, metric.text(result, valid=True), metric.text(result, valid=False)]
                for metric in METRICS
            ],
        )
    ]
    if masks := masks_compared(result):
        tables.append(
            Table(
                title=f"masks: {masks}",
                columns=["metric", "value"],
                numeric=[False, True],
                rows=[[metric.label, metric.text(result, valid=False)] for metric in MASK_METRICS],
            )
        )
    return tables
