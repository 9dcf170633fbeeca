"""The report: one HTML file that needs nothing but itself."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..common.errors import ReportError, VerifyError, shown
from . import thresholds
from .gallery import Gallery
from .inputs import Subject
from .table import MASK_METRICS, METRICS, masks_compared, number
from .thresholds import store_audit

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
            checks=thresholds.run_checks(data.result, data.result["subject"]["thresholds"]),
            describe=thresholds.describe,
            distinguishable=thresholds.distinguishable,
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
    from .rendering.charts import histogram, line_chart

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


# --- Where the numbers come from: what the report says of student, teacher, store and comparison.

Pairs = list[tuple[str, str]]


def provenance(subject: Subject, split: str) -> dict[str, Pairs]:
    """Heading -> (name, value) pairs, for the report."""
    return {
        "Student": _student(subject),
        "Teacher": _teacher(subject),
        "Store": _store(subject),
        "This comparison": _comparison(subject, split),
    }


def _student(subject: Subject) -> Pairs:
    info, run = subject.info, subject.run
    parameters = sum(parameter.numel() for parameter in subject.student.parameters())
    pairs = [
        ("encoder", str(info["student"])),
        ("parameters", f"{parameters:,}"),
        ("file", str(subject.file)),
    ]
    if "epoch" in info:
        pairs.append(("trained for", f"{info['epoch']} epochs, {info['step']:,} steps"))
    if run is not None:
        options, resolved = run.config["config"], run.config["resolved"]
        pairs += [
            ("run", run.path.name),
            ("learning rate", f"{options['lr']:g}, weight decay {options['weight_decay']:g}"),
            ("batch size", f"{options['batch_size']}, loss over {options['loss_region']} cells"),
            ("seed", str(options["seed"])),
            ("rows", f"{len(run.split.train):,} training, {len(run.split.val):,} validation"),
            ("trained in", f"{resolved['precision']} on {resolved['device']}"),
        ]
    return [*pairs, ("written by", _versions(info.get("versions", {})))]


def _teacher(subject: Subject) -> Pairs:
    spec = subject.store.spec
    return [
        ("encoder", spec.teacher),
        ("checkpoint", spec.checkpoint or "in the package"),
        ("SHA-256", spec.checkpoint_sha256),
        ("computed in", spec.precision),
    ]


def _store(subject: Subject) -> Pairs:
    spec, counts = subject.store.spec, subject.store.manifest.counts()
    return [
        ("path", str(subject.store.path.absolute())),
        ("id", spec.store_id),
        ("embeddings", f"256 x {spec.grid} x {spec.grid} {spec.dtype}, images of {spec.image_size} pixels"),
        ("rows", f"{counts.done:,} done, {counts.failed:,} failed, {counts.pending:,} pending"),
        ("audit", _audit(store_audit(subject.store))),
        ("subset", f"fraction {spec.subset['fraction']:g}, seed {spec.subset['seed']}"),
        ("images", str(subject.image_root or f"kept in the store as {spec.kept_images}")),
        ("written by", _versions(spec.versions)),
    ]


def _audit(audit: Mapping[str, Any] | None) -> str:
    if audit is None:
        return "no row was embedded again"
    return (
        f"{audit['rows']:,} row(s) embedded again in float32: cosine at least {number(audit['cosine_min'], '.6f')}, "
        f"relative mse at most {number(audit['relative_mse_max'], '.2g')}"
    )


def _comparison(subject: Subject, split: str) -> Pairs:
    return [
        ("split", f"{split}: {len(subject.rows):,} images"),
        ("computed in", f"{subject.compute.precision} on {subject.compute.device}; metrics in float64"),
        ("skill against", f"the mean embedding of {subject.mean_source}"),
        ("computed by", _versions({"mobilesam": __version__, "torch": torch.__version__})),
    ]


def _versions(versions: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in dict(versions).items()) or "unknown"


# --- What a run logged, as the columns that the report draws.


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Columns of the training lines, and of the validation lines; NaN where a number was undefined."""

    train_step: list[int]
    train_loss: list[float]
    val_epoch: list[int]
    val_step: list[int]
    val_loss: list[float]
    """The mse over the cells that the loss counts, so that it compares with `train_loss`."""
    val_cosine: list[float]
    val_skill: list[float]
    """Over valid cells, as `val_cosine`."""
    loss_region: str


def read_curves(history: Iterable[Mapping[str, Any]], loss_region: str) -> Curves:
    """Sorts the lines of metrics.jsonl into columns."""
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


def thin(x: list[int], y: list[float], most: int = 400) -> tuple[list[float], list[float]]:
    """At most `most` points: means of equal runs of neighbours, so that the page stays small."""
    width = -(-len(x) // most)
    if width <= 1:
        return list(x), list(y)
    runs = [slice(start, start + width) for start in range(0, len(x), width)]
    return [_mean(x[run]) for run in runs], [_mean(y[run]) for run in runs]


def _mean(values: list[int] | list[float]) -> float:
    return math.fsum(values) / len(values)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
