"""Report of a verification: one self-contained HTML file, its provenance section, and writing such files."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..common.durable import write_atomic
from ..common.errors import ReportError, VerifyError, shown
from .gallery import Gallery
from .inputs import Inputs
from .rendering.charts import Curves, verify_charts
from .table import MASK_METRICS, METRICS, masks_compared, number
from .thresholds import describe, distinguishable, run_checks, store_audit

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Content of the page, free of any file or model."""

    result: Mapping[str, Any]
    """As `verify` returns it."""
    created: str
    """Date and time."""
    provenance: Mapping[str, Sequence[tuple[str, str]]]
    """Heading -> (name, value) pairs."""
    cosines: Sequence[float]
    """Each image's cosine over its valid cells."""
    curves: Curves | None
    """None for a student without its run."""
    gallery: Gallery | None


def check_report(path: Path) -> None:
    """Refuse, before any long work, a report that could not be written in the end.

    Raises:
        VerifyError: matplotlib or jinja2 isn't installed, or `path` can't be created or replaced.
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
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise VerifyError(f"cannot write the report in {path.parent}: {error.strerror}") from error


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # sys.modules holds None for it: blocked
        return False


@contextmanager
def report_errors(result: dict[str, Any], named: dict[str, Any]) -> Iterator[None]:
    """Turn any exception in the context, in which a report is made, into one that keeps the result.

    Args:
        result: of hours of comparing, which must not be lost with a page.
        named: the result or the part of it that has the report's path; the path becomes None on failure.

    Raises:
        ReportError: for any exception in the context.
    """
    try:
        yield
    except Exception as error:
        named["report"] = None
        raise ReportError(f"no report: {error}", result) from error


def write_report(path: Path, data: ReportData) -> None:
    """Render the page and write it. Raises as `write_page`."""
    write_page(path, render(data))


def write_page(path: Path, html: str) -> None:
    """Replace the file at `path` by a page as a whole: an interrupted or failed write leaves the old content.

    Raises:
        VerifyError: the file can't be written.
    """
    try:
        write_atomic(path, html.encode())
    except OSError as error:
        raise VerifyError(f"cannot write the report {path}: {error.strerror}") from error


def render(data: ReportData) -> str:
    """Return the page as text. Names may hold anything: the template engine escapes them."""
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
            checks=run_checks(data.result, data.result["subject"]["thresholds"]),
            describe=describe,
            distinguishable=distinguishable,
            charts=verify_charts(data.curves, data.cosines, data.result["cosine_valid"]),
        )
    )


def page_environment() -> Environment:
    """Return the template engine for the pages in `rendering`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Every expression passes through _printable: a name may hold a newline, or bytes that no encoding can write.
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
    """Escape text that isn't markup yet; return anything else unchanged."""
    return shown(value) if type(value) is str else value


Pairs = list[tuple[str, str]]


def provenance(inputs: Inputs, split: str) -> dict[str, Pairs]:
    """Return heading -> (name, value) pairs about student, teacher, store and comparison; `split` is its name."""
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
        pairs.append(("trained for", f"{info['epoch']} epochs, {info['step']:,} steps"))
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
        f"{audit['rows']:,} row(s) embedded again in float32: cosine at least {number(audit['cosine_min'], '.6f')}, "
        f"relative mse at most {number(audit['relative_mse_max'], '.2g')}"
    )


def _comparison(inputs: Inputs, split: str) -> Pairs:
    return [
        ("split", f"{split}: {len(inputs.rows):,} images"),
        ("computed in", f"{inputs.compute.precision} on {inputs.compute.device}; metrics in float64"),
        ("skill against", f"the mean embedding of {inputs.mean.source}"),
        ("computed by", _versions({"mobilesam": __version__, "torch": torch.__version__})),
    ]


def _versions(versions: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in dict(versions).items()) or "unknown"
