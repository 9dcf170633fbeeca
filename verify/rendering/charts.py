"""Line charts and histograms as inline SVG in the page's CSS colours, and a run's log as their columns."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
"""CSS variable -> placeholder colour. Matplotlib knows no CSS variables: it draws in the placeholders, which are
replaced in the finished SVG."""

SIZE = (4.1, 2.75)
"""Width and height of a chart in inches."""

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Label -> (x values, y values)."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Columns of a run's training lines and validation lines; NaN where a number was undefined."""

    train_step: list[int]
    train_loss: list[float]
    val_epoch: list[int]
    val_step: list[int]
    val_loss: list[float]
    """MSE over the cells that the loss counts, so that it compares with `train_loss`."""
    val_cosine: list[float]
    """Mean over images, valid cells, as `val_skill`."""
    val_skill: list[float]
    loss_region: str
    """Cells that the loss counts: "all" or "valid"."""


def read_curves(history: Iterable[Mapping[str, Any]], loss_region: str) -> Curves:
    """Sort the lines of a run's metrics.jsonl into columns."""
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


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def thin(x: list[int], y: list[float], most: int = 400) -> tuple[list[float], list[float]]:
    """Reduce a series to at most `most` points, means of equal runs of neighbours, so that the page stays small."""
    width = -(-len(x) // most)
    if width <= 1:
        return list(x), list(y)
    runs = [slice(start, start + width) for start in range(0, len(x), width)]
    return [_mean(x[run]) for run in runs], [_mean(y[run]) for run in runs]


def _mean(values: list[int] | list[float]) -> float:
    return math.fsum(values) / len(values)


def verify_charts(
    curves: Curves | None, cosines: Sequence[float], summary: Mapping[str, float]
) -> dict[str, str]:
    """Draw the charts of a verification for which there is data.

    Args:
        curves: of the student's run; None without one.
        cosines: each image's cosine over its valid cells.
        summary: their `mean` and `p5`.

    Returns:
        `cosines`, `loss`, `quality` -> SVG elements as text.
    """
    charts = {}
    if len(cosines) > 1:
        marks = {"mean": summary["mean"], "5th percentile": summary["p5"]}
        charts["cosines"] = histogram("cosines", cosines, marks, xlabel="cosine of an image, valid cells")
    if curves is not None and curves.train_step:
        series: dict[str, tuple[Sequence[float], Sequence[float]]] = {
            "training loss": thin(curves.train_step, curves.train_loss)
        }
        if curves.val_loss:
            series["validation loss"] = (curves.val_step, curves.val_loss)
        charts["loss"] = line_chart("loss", series, xlabel="step", markers=["validation loss"])
    if curves is not None and curves.val_epoch:
        series = {
            "cosine": (curves.val_epoch, curves.val_cosine),
            "skill": (curves.val_epoch, curves.val_skill),
        }
        charts["quality"] = line_chart("quality", series, xlabel="epoch", markers=["cosine", "skill"])
    return charts


def line_chart(name: str, series: Series, *, xlabel: str, markers: Sequence[str] = ()) -> str:
    """Draw lines over a common x axis; the y axis is logarithmic for positive values that span a factor of 5.

    Args:
        name: prefix of the SVG's ids, unique on the page.
        series: at most two.
        xlabel: label of the x axis.
        markers: labels of the series that are drawn with a dot at each point.

    Returns:
        an SVG element as text.
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
    """Draw the distribution of `values` over images, with a labelled vertical line for each of `marks`.

    Args:
        name: prefix of the SVG's ids, unique on the page.
        values: one of each image, at least one.
        marks: label -> position, at most two.
        xlabel: label of the x axis.

    Returns:
        an SVG element as text.
    """
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
    """Return the lowest and the highest value, moved apart to a distance of at least `least`.

    The values of a perfect student differ by rounding alone: too little for bins of their own.
    """
    low, high = float(min(values)), float(max(values))
    margin = max(0.0, (least - (high - low)) / 2)
    return low - margin, high + margin


def _legend(figure: Figure) -> None:
    """Add a legend above the axes, where no data is."""
    figure.legend(loc="outside upper left", ncols=2, borderaxespad=0.2, handlelength=1.6, columnspacing=1.4)


def scale_y(axes: Axes, values: np.ndarray) -> None:
    """Make the y axis logarithmic where the values, all of them finite, are positive and span a factor of 5."""
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
    """Yield an empty chart in the placeholder colours; restore matplotlib's global settings afterwards.

    Args:
        name: seed of the SVG's ids, so that equal charts are equal text.
        size: width and height in inches.
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
    """Return the figure as an SVG element: no fixed size, background or metadata, ids that begin with `name`."""
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
