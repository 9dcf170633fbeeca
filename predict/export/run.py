"""One export: check what is asked, load the model, make the files, check them, put them in their places."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import PredictError, shown
from ..config import MAX_IMAGE_SIZE
from ..model import Model, load_model
from ..outputs import Outputs, check_file
from .bundle import check_folder, describe, write_bundle
from .onnx_decoder import export_decoder
from .onnx_encoder import export_encoder
from .onnx_graph import OnnxFile, check_tools
from .torch_export import size_warning, torch_file

TORCH, ENCODER, DECODER, FOLDER = "torch", "encoder", "decoder", "folder"
TORCH_SUFFIXES = (".pt", ".pth")
ONNX_KINDS = (ENCODER, DECODER)

_RULE = "a name that ends in .pt, encoder.onnx or decoder.onnx, or a folder, for all of them"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """All options of one export, checked where they are made.

    `out` says by its name what to make: `.pt` or `.pth` is student and head in mobile_sam.pt's format,
    `...encoder.onnx` and `...decoder.onnx` are the two halves for onnxruntime; a name without a suffix, or a folder
    that is there, is all of them with a model card. `student`, `head` and `image_size` (pixels) are those of
    `load_model`.

    Raises PredictError when `out` is none of these, is what would be read, or the image size is out of range.
    """

    out: Path
    student: Path | None = None
    head: Path | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("out", "student", "head"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Path(value))
        size = self.image_size
        if size is not None and not (64 <= size <= MAX_IMAGE_SIZE and size % 16 == 0):
            raise PredictError(f"--image-size {size} is not a multiple of 16 from 64 to {MAX_IMAGE_SIZE}")
        for option, path in (("--student", self.student), ("--head", self.head)):
            if path is not None and self.kind != FOLDER and path.resolve() == self.out.resolve():
                raise PredictError(f"--out {self.out} is {option} itself: give another name")

    @property
    def kind(self) -> str:
        """What `out` asks for: torch, encoder, decoder or folder."""
        name = self.out.name.lower()
        if self.out.is_dir() or not self.out.suffix:
            return FOLDER
        if name.endswith(TORCH_SUFFIXES):
            return TORCH
        for kind in ONNX_KINDS:
            if name.endswith(f"{kind}.onnx"):
                return kind
        if name.endswith(".onnx"):
            raise PredictError(
                f"--out {shown(str(self.out))}: which half? SAM's ONNX files are two: give a name that ends in "
                "encoder.onnx or in decoder.onnx, or a folder for both"
            )
        raise PredictError(f"--out {shown(str(self.out))}: give {_RULE}")


def export(config: ExportConfig) -> dict[str, Any]:
    """Exports a student with its head, and returns what `--json` prints.

    The keys are `out`, `kind`, `student`, `image_size`, `teacher`, `head`, `files` (name ->
    `bytes` and `sha256`), `checks` (ONNX file -> `max_relative_difference` from torch, and the `limit` that it stayed
    within), `left_out` (file -> why), `warnings` and `seconds`.

    Whatever can be refused is refused before the model is loaded. Files take their places whole, all of them or none,
    after the ONNX ones were checked in onnxruntime.

    Raises PredictError, and the other rooms' errors for a student or a head that is missing or damaged.
    """
    started, kind = time.monotonic(), config.kind
    if kind != TORCH:
        check_tools()
    if kind == FOLDER:
        check_folder(config.out)
    else:
        check_file(config.out, "--out")
    model = load_model(config.student, head=config.head, image_size=config.image_size)
    made = write_bundle(model, config.out) if kind == FOLDER else _write_file(model, config.out, kind)
    return {
        "out": str(config.out),
        "kind": kind,
        "student": model.student,
        "image_size": model.image_size,
        "teacher": model.info.get("teacher"),
        "head": model.head_source,
        **made,
        "seconds": time.monotonic() - started,
    }


def _write_file(model: Model, out: Path, kind: str) -> dict[str, Any]:
    checks, warnings = {}, list(model.notes)
    if kind == TORCH:
        data, warning = torch_file(model), size_warning(model)
        warnings += [] if warning is None else [warning]
    else:
        makers: Mapping[str, Callable[[Model, str], OnnxFile]] = {
            ENCODER: export_encoder,
            DECODER: export_decoder,
        }
        made = makers[kind](model, out.name)
        data, checks[out.name] = made.data, made.check()
    with Outputs() as outputs:
        outputs.add(out, data, "--out")
        outputs.commit()
    return {"files": {out.name: describe(data)}, "checks": checks, "left_out": {}, "warnings": warnings}


def export_lines(result: Mapping[str, Any]) -> list[str]:
    """The result of `export`, as lines for people."""
    lines = [f"{result['student']} at {result['image_size']} pixels, head from {result['head']}"]
    lines += [f"note: {warning}" for warning in result["warnings"]]
    for name, file in result["files"].items():
        check = result["checks"].get(name)
        found = "" if check is None else f"  within {check['max_relative_difference']:.1e} of torch"
        lines.append(f"{name:<20}{file['bytes']:>14,} bytes{found}")
    lines += [f"{name:<20}left out: {reason}" for name, reason in result["left_out"].items()]
    lines.append(f"written to {result['out']} in {result['seconds']:.0f} s")
    return [shown(line) for line in lines]
