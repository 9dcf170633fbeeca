"""The report: one HTML file that needs nothing but itself."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sam.sources import shown
from . import gates
from .curves import Curves, thin
from .errors import ReportError, VerifyError
from .gallery import Gallery
from .table import MASK_METRICS, METRICS, masks_compared, number

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All that the page says, free of any file or model."""

    result: Mapping[str, Any]
    created: str
    provenance: Mapping[str, Sequence[tuple[str, str]]]
    """Heading -> (name, value) pairs."""
    cosines: Sequence[float]
    """Every image's cosine over its valid cells."""
    curves: Curves | None
    gallery: Gallery | None


def check_report(path: Path) -> None:
    """Refuses, before any long work, a report that could not be written in the end.

    Raises VerifyError when matplotlib or jinja2 is missing, or when `path` can't be created or replaced.
    """
    missing = [name for name in ("matplotlib", "jinja2") if not _importable(name)]
    if missing:
        raise VerifyError(
            f"--report needs {' and '.join(missing)}, which is not installed: pip install 'mobilesam[report]'"
        )
    if path.is_dir():
        raise VerifyError(
            f"cannot write the report: {path} is a folder; give a file name, such as {path}/report.html"
        )
    if not path.parent.is_dir():
        raise VerifyError(
            f"cannot write the report: its folder {path.parent} does not exist; create it first"
        )
    try:
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise VerifyError(f"cannot write the report in {path.parent}: {error.strerror}") from error


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # sys.modules holds None for it: blocked
        return False


@contextmanager
def keeping(result: dict[str, Any], named: dict[str, Any]) -> Iterator[None]:
    """The report is made in the context; `named`, the result or a part of it, has its path.

    Raises ReportError for whatever is raised there: hours of comparing are not lost with a page.
    """
    try:
        yield
    except Exception as error:
        named["report"] = None
        raise ReportError(f"no report: {error}", result) from error


def write_report(path: Path, data: ReportData) -> None:
    """Renders `data` and writes it. Raises as `write_page`."""
    write_page(path, render(data))


def write_page(path: Path, html: str) -> None:
    """Puts a page at `path` whole: an interrupted or failed write leaves what was there.

    Raises VerifyError when the file can't be written.
    """
    partial = _partial(path)
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(html)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise VerifyError(f"cannot write the report {path}: {error.strerror}") from error


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def render(data: ReportData) -> str:
    """The page as text. Names may hold anything: the template engine escapes them."""
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            result=data.result,
            subject=data.result["subject"],
            gallery=data.gallery,
            metrics=METRICS,
            mask_metrics=MASK_METRICS if "miou" in data.result else (),
            masks_compared=masks_compared(data.result),
            checks=gates.run_checks(data.result, data.result["subject"]["thresholds"]),
            describe=gates.describe,
            distinguishable=gates.distinguishable,
            charts=_charts(data),
        )
    )


def page_environment() -> Environment:
    """What renders this room's templates."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Every expression passes through _printable: a name may hold a newline or bytes that no encoding can write.
    environment = Environment(
        finalize=_printable,
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment


def _printable(value: Any) -> Any:
    """Text that isn't markup yet, fit to be shown; anything else as it is."""
    return shown(value) if type(value) is str else value


def _charts(data: ReportData) -> dict[str, str]:
    """The charts for which there is data: name -> SVG."""
    from .charts import histogram, line_chart

    charts = {}
    cosine = data.result["cosine_valid"]
    if len(data.cosines) > 1:
        charts["cosines"] = histogram(
            "cosines",
            data.cosines,
            {"mean": cosine["mean"], "5th percentile": cosine["p5"]},
            xlabel="cosine of an image, valid cells",
        )
    curves = data.curves
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
