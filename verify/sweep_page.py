"""The page of a sweep: one HTML file that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..sam.sources import shown
from .report import page_environment
from .spread import Group, grouped
from .sweep_config import SweepConfig
from .sweep_tables import judged_on, others, sweep_tables, told_apart, value_text
from .trials import DECODER


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A chart of the page: `svg` over `caption`, under `title`; `told` says it in words to those who can't see it."""

    title: str
    svg: str
    told: str
    caption: str = ""


def page(config: SweepConfig, outcomes: Sequence[Mapping[str, Any]]) -> str:
    """The page as text."""
    groups = grouped(outcomes)
    done = sum(len(group.outcomes) for group in groups)
    return (
        page_environment()
        .get_template("sweep.html.j2")
        .render(
            name=config.out.name,
            store=config.base.store.name,
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            done=done,
            failures=[outcome for outcome in outcomes if "error" in outcome],
            judged_on=judged_on(outcomes),
            tables=sweep_tables(outcomes),
            outcome=_outcome_chart(groups),
            curves=_curves(groups),
            runs=[outcome for group in groups for outcome in group.outcomes],
            options=["objective", "student", "batch_size", "epochs", "lr", "seed"],
            value_text=value_text,
            split="test" if config.test_store is not None else "val",
        )
    )


def _outcome_chart(groups: Sequence[Group]) -> str | None:
    from .sweep_charts import outcome_chart

    labelled = {_label(groups, group): group for group in groups}
    if not any(group.judged("miou") for group in groups):
        return None
    return outcome_chart("outcomes", labelled, xlabel="mIoU of a run", path=["miou"])


def _curves(groups: Sequence[Group]) -> list[Curve]:
    """Validation error, and masks where the trainer looked at them: a chart of each for runs alike but for length."""
    from .sweep_charts import curve_chart

    facets: dict[str, list[Group]] = {}
    for group in groups:
        facets.setdefault(_facet(groups, group), []).append(group)
    charts: list[Curve] = []
    for title, members in facets.items():
        for column, named in (("mse_valid", "mean squared error"), ("miou", "mIoU")):
            # The embeddings of a student whose decoder alone is trained stay as they are.
            drawn = [each for each in members if column == "miou" or each.options["objective"] != DECODER]
            lines = {_length(group): _columns(group, column) for group in drawn}
            lines = {label: runs for label, runs in lines.items() if runs}
            if not lines:
                continue
            charts.append(
                Curve(
                    title=f"{title}: {named}",
                    svg=curve_chart(f"curve-{len(charts)}", lines, xlabel="step"),
                    told=f"{named} of the validation images after each epoch, {len(members)} settings",
                )
            )
    return charts


def _columns(group: Group, column: str) -> list[tuple[list[float], list[float]]]:
    runs = []
    for outcome in group.outcomes:
        points = [(line["step"], line[column]) for line in outcome["curve"] if line.get(column) is not None]
        if points:
            runs.append(([float(step) for step, _ in points], [float(value) for _, value in points]))
    return runs


def _length(group: Group) -> str:
    return f"batch {group.options['batch_size']}, epochs {group.options['epochs']}"


def _facet(groups: Sequence[Group], group: Group) -> str:
    """What tells the group from others besides its length."""
    parts = [group.options["objective"].replace("_", "-")]
    for name in others(groups):
        if name in group.options:
            value = told_apart(groups, group, name)
            parts.append(value if name == "student" else f"{name.replace('_', ' ')} {value}")
    return shown(", ".join(parts))


def _label(groups: Sequence[Group], group: Group) -> str:
    facet = _facet(groups, group)
    return f"{facet}, {_length(group)}"
