"""The page of a sweep: one HTML file that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ...common.errors import shown
from ..rendering.charts import COLOURS, SIZE, chart_axes, chart_svg, scale_y
from ..report import page_environment
from .aggregate import Group, grouped
from .config import SweepConfig
from .grid import DECODER
from .tables import judged_on, others, sweep_tables, told_apart, value_text


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

    labelled = {_label(groups, group): group for group in groups}
    if not any(group.judged("miou") for group in groups):
        return None
    return outcome_chart("outcomes", labelled, xlabel="mIoU of a run", path=["miou"])


def _curves(groups: Sequence[Group]) -> list[Curve]:
    """Validation error, and masks where the trainer looked at them: a chart of each for runs alike but for length."""

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


# --- The charts of a sweep: where each run came out, and how each got there.

_SERIES = [name for name in COLOURS if name.startswith("series-")]
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
_ROW = 0.27
"""Inches that a group takes in the chart of outcomes."""

Lines = Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]
"""Label -> for each seed its x and y values."""


def outcome_chart(name: str, groups: Mapping[str, Group], *, xlabel: str, path: Sequence[str]) -> str:
    """A line of dots for each labelled group, one a seed, and a tick at their mean, as SVG text."""
    spreads = {label: group.judged(*path) for label, group in groups.items()}
    height = 0.55 + _ROW * len(groups)
    with chart_axes(name, (2 * SIZE[0], height)) as (figure, axes):
        for place, (label, group) in enumerate(groups.items()):
            each = [Group(options={}, outcomes=[outcome]).judged(*path) for outcome in group.outcomes]
            values = [one.mean for one in each if one is not None]
            axes.plot(values, [place] * len(values), "o", color=COLOURS["series-1"], markersize=5, alpha=0.6)
            spread = spreads[label]
            if spread is not None and spread.count > 1:
                axes.plot(
                    [spread.mean], [place], "|", color=COLOURS["ink"], markersize=11, markeredgewidth=1.4
                )
        axes.set_yticks(range(len(groups)), list(groups))
        axes.tick_params(axis="y", labelcolor=COLOURS["ink"], length=0)
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.grid(visible=True, axis="x")
        axes.set_xlabel(xlabel, loc="right")
        return chart_svg(figure, name)


def curve_chart(name: str, lines: Lines, *, xlabel: str) -> str:
    """A line for each run over a common x axis, the seeds of a label in one colour, as SVG text."""
    from matplotlib.ticker import MaxNLocator

    with chart_axes(name) as (figure, axes):
        for place, (label, runs) in enumerate(lines.items()):
            colour = COLOURS[_SERIES[place % len(_SERIES)]]
            dashes = _DASHES[place // len(_SERIES) % len(_DASHES)]
            style: Any = {"color": colour, "linestyle": dashes, "linewidth": 1.2}
            style |= {"marker": "o", "markersize": 2.5}
            for number, (x, y) in enumerate(runs):
                axes.plot(x, y, label=label if number == 0 else None, **style)
        values = np.concatenate([np.asarray(y, dtype=float) for runs in lines.values() for _, y in runs])
        scale_y(axes, values[np.isfinite(values)])
        axes.set_xlabel(xlabel, loc="right")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.legend(
            loc="outside upper left", ncols=2, borderaxespad=0.2, handlelength=1.6, columnspacing=1.2
        )
        return chart_svg(figure, name)
