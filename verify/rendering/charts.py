"""Line charts and histograms as inline SVG whose colours are the page's CSS variables."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib knows no CSS variables: it draws in these stand-ins, which are replaced in the finished SVG.
COLOURS = {
    "ink": "#010203",
    "muted": "#040506",
    "rule": "#070809",
    "series-1": "#0a0b0c",
    "series-2": "#0d0e0f",
    "series-3": "#101112",
    "series-4": "#131415",
    "series-5": "#161718",
    "series-6": "#191a1b",
}
SIZE = (4.1, 2.75)
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Label -> (x values, y values)."""


def line_chart(name: str, series: Series, *, xlabel: str, markers: Sequence[str] = ()) -> str:
    """Lines over a common x axis as SVG text; the y axis is logarithmic where positive values span 5 times.

    `name` keeps the ids of several charts on one page apart. Series named in `markers` are dots on a line.
    """
    from matplotlib.ticker import MaxNLocator

    with chart_axes(name) as (figure, axes):
        for (label, (x, y)), colour in zip(series.items(), ("series-1", "series-2"), strict=False):
            style = (
                {"marker": "o", "markersize": 3.5, "linewidth": 1.2}
                if label in markers
                else {"linewidth": 1.4}
            )
            axes.plot(x, y, color=COLOURS[colour], label=label, **style)
        values = np.concatenate([np.asarray(y, dtype=float) for _, y in series.values()])
        scale_y(axes, values[np.isfinite(values)])
        axes.set_xlabel(xlabel, loc="right")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(series) > 1:
            _legend(figure)
        return chart_svg(figure, name)


def histogram(name: str, values: Sequence[float], marks: Mapping[str, float], *, xlabel: str) -> str:
    """How many of `values` fall where, as SVG text, with a labelled vertical line for each of `marks`."""
    from matplotlib.ticker import MaxNLocator

    with chart_axes(name) as (figure, axes):
        bins = int(np.clip(np.sqrt(len(values)) * 2, 6, 40))
        axes.hist(
            values,
            bins=bins,
            range=bin_range(values),
            histtype="stepfilled",
            color=COLOURS["series-1"],
            alpha=0.55,
            linewidth=0,
        )
        for (label, value), style in zip(marks.items(), ("-", (0, (3, 2))), strict=False):
            axes.axvline(
                value, color=COLOURS["ink"], linewidth=1.2, linestyle=style, label=f"{label} {value:.4f}"
            )
        axes.set_xlabel(xlabel, loc="right")
        axes.set_ylabel("images")
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        _legend(figure)
        return chart_svg(figure, name)


def bin_range(values: Sequence[float], least: float = 1e-4) -> tuple[float, float]:
    """From the lowest to the highest value, widened to `least`: values that differ by rounding alone, as a perfect
    student's, are too close together for bins of their own."""
    low, high = float(min(values)), float(max(values))
    margin = max(0.0, (least - (high - low)) / 2)
    return low - margin, high + margin


def _legend(figure: Figure) -> None:
    """Above the axes, where no data is."""
    figure.legend(loc="outside upper left", ncols=2, borderaxespad=0.2, handlelength=1.6, columnspacing=1.4)


def scale_y(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic y axis where the values, all of them finite, are positive and span 5 times."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if len(values) and values.min() > 0 and values.max() / values.min() >= 5:
        axes.set_yscale("log")
        decades = np.log10(values.max() / values.min())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        # Not matplotlib's own $10^{-1}$: mathtext is laid out for a font that the page doesn't use.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


@contextmanager
def chart_axes(name: str, size: tuple[float, float] = SIZE) -> Iterator[tuple[Figure, Axes]]:
    """An empty chart of `size` inches in the page's stand-in colours.

    Matplotlib's global settings return to what they were.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10,
        "text.color": COLOURS["ink"],
        "axes.labelcolor": COLOURS["muted"],
        "axes.edgecolor": COLOURS["rule"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": COLOURS["rule"],
        "grid.linewidth": 0.7,
        "xtick.color": COLOURS["rule"],
        "xtick.labelcolor": COLOURS["muted"],
        "ytick.color": COLOURS["rule"],
        "ytick.labelcolor": COLOURS["muted"],
        "legend.frameon": False,
        "legend.fontsize": 10,
        "figure.constrained_layout.use": True,
    }
    with rc_context(settings):
        figure = Figure(figsize=size)
        yield figure, figure.add_subplot()


def chart_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element without fixed size, background, metadata or ids that another chart has."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
