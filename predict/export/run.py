"""`mobilesam export`: check the request, load the model, convert it, compare with torch, write the files."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...common.errors import shown
from ...common.table import Table
from ...sam.weights.download import Progress as Download
from ..config import DECODER, ENCODER, FOLDER, TORCH, WEB, ExportConfig
from ..model import Model, load_model, size_words
from ..outputs import EXPORT, Outputs, check_file
from . import bundle
from .bundle import check_folder, describe_file, write_bundle
from .onnx_decoder import export_decoder
from .onnx_encoder import export_encoder
from .onnx_graph import STEPS, Begin, OnnxFile, check_tools, is_older_onnx, silent
from .torch_export import export_torch, size_warning
from .web import run as web
from .web.run import export_web, gather, web_image_size

LOADING, WRITING = "loading the model", bundle.STEPS[-1]
"""First and last step of every export."""

Progress = Callable[[int, int, str], None]
"""Function called with the number of a step that begins, the number of all steps, and the step's name."""


def export(
    config: ExportConfig, progress: Progress | None = None, download: Download | None = None
) -> dict[str, Any]:
    """Export a student with its head.

    Invalid options and outputs are refused before the model is loaded. Either all files are written or none, after
    the ONNX files were compared with torch in onnxruntime.

    Args:
        config: all options.
        progress: called when a step begins.
        download: called with (bytes done, bytes in total) while onnxruntime-web is downloaded for a web demo.

    Returns:
        The object that `--json` prints: `out`, `kind`, `student`, `image_size`, `student_size`, `teacher`, `head`
        (None: an encoder without one), `files` (name -> `bytes` and `sha256`), `checks` (ONNX file ->
        `max_relative_difference` from torch, and the `limit` for it), `onnx` (ONNX file -> `opset`, `ir_version`,
        `oldest_onnxruntime`, and `notes`, what doesn't work with it), `left_out` (file -> reason), `warnings` and
        `seconds`.

    Raises:
        PredictError: a package is missing, the export failed, or a file can't be written.
        DistillError, CheckpointError, StoreError: the student or its head is missing or damaged.
    """
    started, kind = time.monotonic(), config.kind
    if kind != TORCH:
        check_tools()
    parts = None
    if kind == FOLDER:
        check_folder(config.out)
    elif kind == WEB:
        parts = gather(config, download)
    else:
        check_file(config.out, "--out", EXPORT, is_older_onnx)
    begin = _counted(progress, _steps(kind))
    begin(LOADING)
    size = web_image_size(config.student, config.image_size) if kind == WEB else config.image_size
    model = load_model(config.student, head=config.head, needs_head=kind != ENCODER, image_size=size)
    if parts is not None:
        made = export_web(model, config.out, parts, begin)
    elif kind == FOLDER:
        made = write_bundle(model, config.out, begin)
    else:
        made = _write_file(model, config.out, kind, begin)
    return {
        "out": str(config.out),
        "kind": kind,
        "student": model.student,
        "image_size": model.image_size,
        "student_size": model.student_size,
        "teacher": model.info.get("teacher"),
        "head": model.head_source or None,
        **made,
        "seconds": time.monotonic() - started,
    }


def _steps(kind: str) -> Sequence[str]:
    if kind == FOLDER:
        return (LOADING, *bundle.STEPS)
    if kind == WEB:
        return (LOADING, *web.STEPS)
    return (LOADING, WRITING) if kind == TORCH else (LOADING, *STEPS, WRITING)


def _counted(progress: Progress | None, steps: Sequence[str]) -> Begin:
    """Return a function that takes the name of a step and calls `progress` with its number."""
    if progress is None:
        return silent
    return lambda step: progress(steps.index(step) + 1, len(steps), step)


def _write_file(model: Model, out: Path, kind: str, begin: Begin) -> dict[str, Any]:
    checks, formats, warnings = {}, {}, list(model.notes)
    if kind == TORCH:
        begin(WRITING)
        data, warning = export_torch(model), size_warning(model)
        warnings += [] if warning is None else [warning]
    else:
        makers: Mapping[str, Callable[[Model, str, Begin], OnnxFile]] = {
            ENCODER: export_encoder,
            DECODER: export_decoder,
        }
        made = makers[kind](model, out.name, begin)
        data, checks[out.name], formats[out.name] = made.data, made.check(), made.format()
        begin(WRITING)
    with Outputs() as outputs:
        data = outputs.add(out, data, "--out", EXPORT, is_older_onnx)
        outputs.commit()
    return {
        "files": {out.name: describe_file(data)},
        "checks": checks,
        "onnx": formats,
        "left_out": {},
        "warnings": warnings,
    }


def export_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the result of `export` as text: the model, warnings, a table of files, the files left out."""
    head = f", head from {result['head']}" if result["head"] else ""
    lines = [
        f"{result['student']} at {size_words(result)} pixels{head}",
        *(f"note: {warning}" for warning in result["warnings"]),
        *_files_table(result).lines(),
        *(f"{name} left out: {reason}" for name, reason in result["left_out"].items()),
        *(f"{name}: {note}" for name, one in result["onnx"].items() for note in one["notes"]),
        f"written to {result['out']} in {result['seconds']:.0f} s",
        *([f"Next: mobilesam demo {result['out']}"] if result["kind"] == WEB else []),
    ]
    return [shown(line) for line in lines]


def _files_table(result: Mapping[str, Any]) -> Table:
    limits = {
        name: f"within {check['max_relative_difference']:.1e} of torch"
        for name, check in result["checks"].items()
    }
    sizes = {name: file["bytes"] for name, file in result["files"].items()}
    if result["kind"] == WEB:
        # Page and runtime in one row: a visitor's browser loads one of two builds of the latter.
        others = sum(size for name, size in sizes.items() if name not in limits)
        sizes = {name: sizes[name] for name in limits} | {"page, onnxruntime-web, examples": others}
    return Table(
        title="",
        columns=("file", "size", "check"),
        numeric=(False, True, False),
        rows=[(name, f"{size:,} bytes", limits.get(name, "")) for name, size in sizes.items()],
    )
