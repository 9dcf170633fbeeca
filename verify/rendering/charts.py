"""Line charts and histograms as inline SVG in the page's CSS colours; a run's log as columns for them."""

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
"""Placeholder colours by CSS variable. Matplotlib has no CSS variables: it draws in placeholder colours, which are
replaced in the SVG."""

SIZE = (4.1, 2.75)
"""Width and height of a chart in inches."""

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""x values and y values by label."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Columns of a run's training lines and validation lines; NaN for undefined numbers."""

    train_step: list[int]
    train_loss: list[float]
    val_epoch: list[int]
    val_step: list[int]
    val_loss: list[float]
    """MSE over the cells of `loss_region`, comparable with `train_loss`."""
    val_cosine: list[float]
    """Mean over images, over valid cells."""
    val_skill: list[float]
    """Skill over valid cells."""
    loss_region: str
    """Cells that the loss averages over: "all" or "valid"."""


def read_curves(history: Iterable[Mapping[str, Any]], loss_region: str) -> Curves:
    """Convert the lines of a run's metrics.jsonl to columns.

    Args:
        history: lines, as from `Run.history`.
        loss_region: cells that the loss averages over: "all" or "valid".
    """
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
    """Downsample a series by averaging equal groups of neighbours, so that the page stays small.

    Args:
        x: x values.
        y: y values, as many.
        most: largest number of points.

    Returns:
        x values and y values, at most `most` each.
    """
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
        curves: training curves of the student's run; None without a run.
        cosines: cosine of each image, over its valid cells.
        summary: `mean` and `p5` of the cosines.

    Returns:
        SVG elements as text, by name: `cosines`, `loss`, `quality`.
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
        series: one or two series.
        xlabel: label of the x axis.
        markers: labels of the series drawn with a dot at each point.

    Returns:
        An SVG element as text.
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
    """Draw a histogram of `values` over images, with a labelled vertical line for each of `marks`.

    Args:
        name: prefix of the SVG's ids, unique on the page.
        values: one value per image, at least one.
        marks: positions by label, at most two.
        xlabel: label of the x axis.

    Returns:
        An SVG element as text.
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
    """Return the range of `values`, widened to at least `least`.

    The values of a perfect student differ only by rounding, which must not fill the bins.

    Args:
        values: at least one number.
        least: smallest width of the range.
    """
    low, high = float(min(values)), float(max(values))
    margin = max(0.0, (least - (high - low)) / 2)
    return low - margin, high + margin


def _legend(figure: Figure) -> None:
    """Add a legend above the axes, where it covers no data."""
    figure.legend(loc="outside upper left", ncols=2, borderaxespad=0.2, handlelength=1.6, columnspacing=1.4)


def scale_y(axes: Axes, values: np.ndarray) -> None:
    """Make the y axis logarithmic if the values are positive and span a factor of 5 or more.

    Args:
        axes: axes to change.
        values: finite values drawn on them, one-dimensional; may be empty.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if len(values) and values.min() > 0 and values.max() / values.min() >= 5:
        axes.set_yscale("log")
        decades = np.log10(values.max() / values.min())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        # Not matplotlib's own $10^{-1}$: mathtext is laid out for another font than the page's.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


@contextmanager
def chart_axes(name: str, size: tuple[float, float] = SIZE) -> Iterator[tuple[Figure, Axes]]:
    """Yield an empty chart in the placeholder colours; restore matplotlib's global settings afterwards.

    Args:
        name: seed of the SVG's ids, so that equal charts have equal text.
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
    """Return a figure as an SVG element without fixed size, background or metadata.

    Args:
        figure: figure drawn in the placeholder COLOURS.
        name: prefix of the SVG's ids, unique on the page.

    Returns:
        An SVG element as text, in CSS variables.
    """
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
