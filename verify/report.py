"""Report of a verification, one self-contained HTML file, and the functions that all reports use to write pages."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..common.config import missing_packages
from ..common.durable import explain_os_errors
from ..common.errors import ReportError, VerifyError, counted, shown
from ..common.outputs import refuse_foreign, write_output
from .gallery import Gallery
from .inputs import Inputs
from .rendering.charts import Curves, verify_charts
from .summary import figures, headline
from .table import MASK_METRICS, METRICS, masks_compared, number
from .thresholds import describe, distinguishable, run_checks, store_audit

if TYPE_CHECKING:
    from jinja2 import Environment

VERIFY_REPORT, EVALUATE_REPORT, SWEEP_REPORT = "verify report", "evaluate report", "sweep report"
"""Kinds of reports, as their marks name them."""

_OLDER_START = 4096
"""Bytes at a page's start in which its title is."""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Content of the page, independent of files and models."""

    result: Mapping[str, Any]
    """Result of `verify`."""
    created: str
    """Date and time in UTC, as text."""
    provenance: Mapping[str, Sequence[tuple[str, str]]]
    """(name, value) pairs by heading."""
    cosines: Sequence[float]
    """Cosine of each image, over its valid cells."""
    curves: Curves | None
    """Training curves; None for a student without its run."""
    gallery: Gallery | None
    """Worst and best images; None if there are none."""


def check_report(path: Path, kind: str) -> None:
    """Check, before any long work, that a report can be written.

    Args:
        path: HTML file to create; a report of the same kind may be replaced.
        kind: kind of report, as its mark names it.

    Raises:
        VerifyError: matplotlib or jinja2 isn't installed, `path` can't be created, or something else is there.
    """
    missing = missing_packages(("matplotlib", "jinja2"))
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
    trial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise VerifyError(f"cannot write the report in {path.parent}: {error.strerror}") from error
    with explain_os_errors(path, VerifyError):
        _refuse_foreign(path, kind)


def _refuse_foreign(path: Path, kind: str) -> None:
    refuse_foreign(path, kind, "--report", VerifyError, partial(_is_older_page, kind))


def _is_older_page(kind: str, path: Path) -> bool:
    """Return True if the file is a page of this kind that a version without marks wrote."""
    with open(path, "rb") as file:
        start, _, _ = file.read(_OLDER_START).partition(b"<style>")
    command = kind.removesuffix(" report")
    return start.startswith(b"<!DOCTYPE html>\n") and f": mobilesam {command}</title>\n".encode() in start


@contextmanager
def report_errors(result: dict[str, Any], path_holder: dict[str, Any]) -> Iterator[None]:
    """Turn any exception during the writing of a report into a ReportError that carries the result.

    The result may have taken hours to compute, and must not be lost with the page.

    Args:
        result: result of the command.
        path_holder: the dictionary that has the report's path as `report`: `result` or a part of it; on failure the
            path becomes None.

    Raises:
        ReportError: for any exception in the context.
    """
    try:
        yield
    except Exception as error:
        path_holder["report"] = None
        raise ReportError(f"no report: {error}", result) from error


def write_report(path: Path, data: ReportData) -> None:
    """Render the page and write it.

    Args:
        path: HTML file to create or replace.
        data: content of the page.

    Raises:
        VerifyError: the file can't be written.
    """
    write_page(path, render(data), VERIFY_REPORT)


def write_page(path: Path, html: str, kind: str) -> None:
    """Write a page atomically: an interrupted or failed write leaves the old content.

    Args:
        path: HTML file to create; a report of the same kind is replaced.
        html: content of the file, without a mark.
        kind: kind of report.

    Raises:
        VerifyError: the file can't be written, or something else is there.
    """
    try:
        write_output(path, html.encode(), kind, lambda: _refuse_foreign(path, kind))
    except OSError as error:
        raise VerifyError(f"cannot write the report {path}: {error.strerror}") from error


def render(data: ReportData) -> str:
    """Return the page as HTML. The template engine escapes names, which may contain any characters."""
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            result=data.result,
            subject=data.result["subject"],
            gallery=data.gallery,
            headline=headline(data.result),
            figures=figures(data.result),
            metrics=METRICS,
            mask_metrics=MASK_METRICS if "miou" in data.result else (),
            masks_compared=masks_compared(data.result),
            checks=run_checks(data.result, data.result["subject"]["thresholds"]),
            describe=describe,
            distinguishable=distinguishable,
            charts=verify_charts(data.curves, data.cosines, data.result["cosine_valid"]),
        )
    )


def page_environment() -> Environment:
    """Return the template engine for the pages in `rendering`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Every expression passes through _printable: a name may contain a newline, or bytes that aren't valid UTF-8.
    environment = Environment(
        finalize=_printable,
        loader=FileSystemLoader(Path(__file__).parent / "rendering"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment


def _printable(value: Any) -> Any:
    """Make plain text printable; return markup and other values unchanged."""
    return shown(value) if type(value) is str else value


Pairs = list[tuple[str, str]]


def provenance(inputs: Inputs, split: str) -> dict[str, Pairs]:
    """Describe student, teacher, store and comparison for the report.

    Args:
        inputs: inputs of the verification, still open.
        split: "val", "train" or "all".

    Returns:
        (name, value) pairs by heading.
    """
    return {
        "Student": _student(inputs),
        "Teacher": _teacher(inputs),
        "Store": _store(inputs),
        "This comparison": _comparison(inputs, split),
    }


def _student(inputs: Inputs) -> Pairs:
    student = inputs.student
    info, run = student.info, student.run
    parameters = sum(parameter.numel() for parameter in student.encoder.parameters())
    pairs = [
        ("encoder", str(info["student"])),
        ("parameters", f"{parameters:,}"),
        ("file", str(student.file)),
    ]
    if "epoch" in info:
        pairs.append(("trained for", f"{counted(info['epoch'], 'epoch')}, {counted(info['step'], 'step')}"))
    if run is not None:
        options, resolved = run.description.options, run.description.resolved
        pairs += [
            ("run", run.path.name),
            ("learning rate", f"{options['lr']:g}, weight decay {options['weight_decay']:g}"),
            ("batch size", f"{options['batch_size']}, loss over {options['loss_region']} cells"),
            ("seed", str(options["seed"])),
            ("rows", f"{len(run.split.train):,} training, {len(run.split.val):,} validation"),
            ("trained in", f"{resolved.precision} on {resolved.device}"),
        ]
    return [*pairs, ("written by", _versions(info.get("versions", {})))]


def _teacher(inputs: Inputs) -> Pairs:
    spec = inputs.store.spec
    return [
        ("encoder", spec.teacher),
        ("checkpoint", spec.checkpoint or "in the package"),
        ("SHA-256", spec.checkpoint_sha256),
        ("computed in", spec.precision),
    ]


def _store(inputs: Inputs) -> Pairs:
    spec, counts = inputs.store.spec, inputs.store.manifest.counts()
    return [
        ("path", str(inputs.store.path.absolute())),
        ("id", spec.store_id),
        ("embeddings", f"256 x {spec.grid} x {spec.grid} {spec.dtype}, images of {spec.image_size} pixels"),
        ("rows", f"{counts.done:,} done, {counts.failed:,} failed, {counts.pending:,} pending"),
        ("audit", _audit(store_audit(inputs.store))),
        ("subset", f"fraction {spec.subset['fraction']:g}, seed {spec.subset['seed']}"),
        ("images", str(inputs.image_root or f"kept in the store as {spec.kept_images}")),
        ("written by", _versions(spec.versions)),
    ]


def _audit(audit: Mapping[str, Any] | None) -> str:
    if audit is None:
        return "no row was embedded again"
    return (
        f"{counted(audit['rows'], 'row')} embedded again in float32: cosine at least "
        f"{number(audit['cosine_min'], '.6f')}, "
        f"relative mse at most {number(audit['relative_mse_max'], '.2g')}"
    )


def _comparison(inputs: Inputs, split: str) -> Pairs:
    return [
        ("split", f"{split}: {counted(len(inputs.rows), 'image')}"),
        ("computed in", f"{inputs.compute.precision} on {inputs.compute.device}; metrics in float64"),
        ("skill against", f"the mean embedding of {inputs.mean.source}"),
        ("computed by", _versions({"mobilesam": __version__, "torch": torch.__version__})),
    ]


def _versions(versions: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in dict(versions).items()) or "unknown"
