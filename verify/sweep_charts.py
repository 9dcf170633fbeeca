"""The charts of a sweep: where each run came out, and how each got there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .charts import COLOURS, SIZE, chart_axes, chart_svg, scale_y
from .spread import Group

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
