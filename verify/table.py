"""The metrics' names and definitions, and the table of them that the terminal shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..common.errors import shown
from . import thresholds


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a result: `path` leads to it, and with `_valid` after its first part to its headline form.

    Numbers about masks have one form only.
    """

    label: str
    path: tuple[str, ...]
    digits: str
    definition: str

    def text(self, result: Mapping[str, Any], *, valid: bool) -> str:
        """The number as text; "undefined" where there is none."""
        first, *rest = self.path
        value = result[f"{first}_valid" if valid else first]
        for part in rest:
            value = None if value is None else value[part]
        return number(value, self.digits)


def number(value: float | None, digits: str) -> str:
    """A number in the format `digits`; "undefined" where there is none."""
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
)


def masks_compared(result: Mapping[str, Any]) -> str:
    """How the masks of a result came about; "" where there are none."""
    if "miou" not in result:
        return ""
    side = round(result["prompts"] ** 0.5)
    prompts, empty = result["prompts"] * result["images"], result["empty_masks"]
    text = f"{side} x {side} point{'' if side == 1 else 's'} an image"
    if empty["teacher"] or empty["student"]:
        text += f"; empty masks: teacher {empty['teacher']:,}, student {empty['student']:,} of {prompts:,}"
    return text


def table_lines(result: Mapping[str, Any]) -> list[str]:
    """What `mobilesam verify` prints: what was compared, the metrics (headline first), the verdict."""
    subject: Mapping[str, Any] = result["subject"]
    images = f"{result['images']:,} image{'' if result['images'] == 1 else 's'}"
    lines = [f"{subject['student']} against {subject['teacher']}, split {subject['split']}: {images}"]
    lines += [f"note: {note}" for note in subject["notes"]]
    lines += ["", f"{'metric':<24}{'valid cells':>14}{'all cells':>14}"]
    for metric in METRICS:
        values = metric.text(result, valid=True), metric.text(result, valid=False)
        lines.append(f"{metric.label:<24}{values[0]:>14}{values[1]:>14}")
    if masks := masks_compared(result):
        lines += ["", f"masks: {masks}"]
        lines += [f"{metric.label:<24}{metric.text(result, valid=False):>14}" for metric in MASK_METRICS]
    lines.append("")
    lines += [f"FAILED  {thresholds.describe(check)}" for check in result["failed_checks"]]
    checks = thresholds.run_checks(result, subject["thresholds"])
    lines += [f"passed  {thresholds.describe(check)}" for check in checks if check["passed"]]
    if not checks:
        lines.append("no thresholds set (--min-cosine, --min-skill, --min-miou)")
    if subject["report"]:
        lines.append(f"report  {subject['report']}")
    return [shown(line) for line in lines]
