"""Report of a sweep: one self-contained HTML file with tables, each run's result, and training curves."""

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
from .tables import caption, distinct_value, other_options, sweep_tables, value_text

_SERIES = [name for name in COLOURS if name.startswith("series-")]
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
_ROW = 0.27
"""Height in inches of one group in the chart of outcomes."""

Lines = Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]
"""x and y values of each seed, by label."""


@dataclass(frozen=True, kw_only=True)
class CurveChart:
    """Chart of training curves."""

    title: str
    svg: str
    """SVG element as text."""
    description: str
    """Text for readers who can't see the chart."""


def render_sweep(config: SweepConfig, outcomes: Sequence[Mapping[str, Any]]) -> str:
    """Return the page as HTML.

    Args:
        config: options of the sweep.
        outcomes: outcomes of `run_trial`.
    """
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
            caption=caption(outcomes),
            tables=sweep_tables(outcomes),
            outcome_chart=_outcome_chart(groups),
            curves=_curves(groups),
            runs=[outcome for group in groups for outcome in group.outcomes],
            options=["objective", "student", "batch_size", "epochs", "lr", "seed"],
            value_text=value_text,
            split="test" if config.test_store is not None else "val",
        )
    )


def _outcome_chart(groups: Sequence[Group]) -> str | None:
    labelled = {_label(groups, group): group for group in groups}
    if not any(group.verified("miou") for group in groups):
        return None
    return draw_outcomes("outcomes", labelled, xlabel="mIoU of a run", path=["miou"])


def _curves(groups: Sequence[Group]) -> list[CurveChart]:
    """Draw validation error and, if measured, mIoU, in one chart per set of runs that differ only in length."""
    facets: dict[str, list[Group]] = {}
    for group in groups:
        facets.setdefault(_facet(groups, group), []).append(group)
    charts: list[CurveChart] = []
    for title, members in facets.items():
        for column, name in (("mse_valid", "mean squared error"), ("miou", "mIoU")):
            # Decoder finetuning doesn't change the student's embeddings.
            drawn = [each for each in members if column == "miou" or each.options["objective"] != DECODER]
            lines = {_length(group): _columns(group, column) for group in drawn}
            lines = {label: runs for label, runs in lines.items() if runs}
            if not lines:
                continue
            charts.append(
                CurveChart(
                    title=f"{title}: {name}",
                    svg=draw_curves(f"curve-{len(charts)}", lines, xlabel="step"),
                    description=f"{name} of the validation images after each epoch, {len(members)} settings",
                )
            )
    return charts


def _columns(group: Group, column: str) -> list[tuple[list[float], list[float]]]:
    """Return the steps and values of a column of each run's validation lines; a run without values is left out."""
    runs = []
    for outcome in group.outcomes:
        points = [(line["step"], line[column]) for line in outcome["curve"] if line.get(column) is not None]
        if points:
            runs.append(([float(step) for step, _ in points], [float(value) for _, value in points]))
    return runs


def _length(group: Group) -> str:
    return f"batch {group.options['batch_size']}, epochs {group.options['epochs']}"


def _facet(groups: Sequence[Group], group: Group) -> str:
    """Return the options other than batch size and epochs in which the group differs from others, as text."""
    parts = [group.options["objective"].replace("_", "-")]
    for name in other_options(groups):
        if name in group.options:
            value = distinct_value(groups, group, name)
            parts.append(value if name == "student" else f"{name.replace('_', ' ')} {value}")
    return shown(", ".join(parts))


def _label(groups: Sequence[Group], group: Group) -> str:
    return f"{_facet(groups, group)}, {_length(group)}"


def draw_outcomes(name: str, groups: Mapping[str, Group], *, xlabel: str, path: Sequence[str]) -> str:
    """Draw a row of dots for each group, one dot per seed, and a tick at their mean.

    Args:
        name: prefix of the SVG's ids, unique on the page.
        groups: groups by label.
        xlabel: label of the x axis.
        path: keys of the number in the result of `verify`.

    Returns:
        An SVG element as text.
    """
    spreads = {label: group.verified(*path) for label, group in groups.items()}
    height = 0.55 + _ROW * len(groups)
    with chart_axes(name, (2 * SIZE[0], height)) as (figure, axes):
        for place, (label, group) in enumerate(groups.items()):
            each = [Group(options={}, outcomes=[outcome]).verified(*path) for outcome in group.outcomes]
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


def draw_curves(name: str, lines: Lines, *, xlabel: str) -> str:
    """Draw a line for each run over a common x axis, all seeds of a label in one colour.

    Args:
        name: prefix of the SVG's ids, unique on the page.
        lines: x and y values of each seed, by label.
        xlabel: label of the x axis.

    Returns:
        An SVG element as text.
    """
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
