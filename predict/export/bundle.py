"""Folder of an export: its files, their description in model.json, replacement of an older export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from ...common.durable import explain_os_errors
from ...common.errors import PredictError, counted, shown
from ...common.outputs import marked, read_mark
from ...distill import DistillError, save_student
from ...distill.run_description import MODEL_FILE
from ...distill.students.student_file import check_tensors
from ...sam import preprocessing_recipe
from ...sam.modeling.head_shapes import HEAD_PREFIXES
from ...sam.weights.checkpoint import ENCODER_PREFIX
from ...sam.weights.download import file_sha256
from ..model import Model
from ..outputs import EXPORT, Outputs, check_writable, is_partial, read_description
from .model_card import model_card
from .onnx_decoder import export_decoder
from .onnx_encoder import export_encoder
from .onnx_graph import STEPS as ONNX_STEPS
from .onnx_graph import Begin, silent, versions
from .torch_export import export_torch, size_warning, unsupported_reason

FORMAT = "mobilesam model 1"
TORCH_FILE = "model.pt"
DESCRIPTION_FILE = "model.json"
ENCODER_FILE = "encoder.onnx"
DECODER_FILE = "decoder.onnx"
CARD_FILE = "README.md"
FILES = (TORCH_FILE, MODEL_FILE, ENCODER_FILE, DECODER_FILE, CARD_FILE, DESCRIPTION_FILE)


def check_folder(folder: Path) -> None:
    """Refuse a folder that can't be written to, or that holds anything other than an older export.

    Raises:
        PredictError: the folder is refused; the message gives the reason, or the first of the other files.
    """
    if not folder.exists():
        if folder.is_symlink():
            raise PredictError(f"--out {shown(str(folder))} is a link to nothing: give another name")
        check_writable(folder.absolute().parent, "--out")
        return
    with explain_os_errors(folder, PredictError, "--out"):
        names = {path.name for path in folder.iterdir() if not is_partial(path)}
    description = read_description(folder / DESCRIPTION_FILE, FORMAT)
    others = sorted(names - set(FILES))
    if (
        description is None and not others
    ):  # the files of an export that was killed while it renamed them, or others
        others = sorted(name for name in names if not _is_known(folder / name, None))
    if others:
        raise PredictError(
            f"{shown(str(folder))} holds {counted(len(others), 'file')} that no export has, such as "
            f"{shown(others[0])}: give a new folder"
        )
    if description is not None:
        for name in sorted(names):
            _refuse_changed(folder / name, description)
    check_writable(folder, "--out")


def _is_known(path: Path, description: Mapping[str, Any] | None) -> bool:
    """Return True if a file of an export, described by its model.json, is as it was written."""
    with explain_os_errors(path, PredictError):
        mark = read_mark(path)
        if mark is not None:
            return mark.kind == EXPORT and mark.intact
        if path.name == DESCRIPTION_FILE:
            return description is not None  # of a version without marks
        listed = _object((_object((description or {}).get("files")) or {}).get(path.name)) or {}
        if listed.get("sha256") == file_sha256(path):
            return True
        # Renamed before a kill, model.json not: the file's own SHA-256 says that it is whole.
        card = path.with_name(CARD_FILE)
        return path.name == MODEL_FILE and card.is_file() and read_mark(card) is not None and _is_whole(path)


def _is_whole(path: Path) -> bool:
    try:
        check_tensors(path)
    except DistillError:
        return False
    return True


def _refuse_changed(path: Path, description: Mapping[str, Any] | None) -> None:
    """Refuse to replace a file of an export, described by its model.json, that isn't as it was written."""
    if not _is_known(path, description):
        raise PredictError(
            f"{shown(str(path))} was changed since mobilesam exported it, or is damaged: give --out a new folder, or "
            "delete that file first"
        )


STEPS = (
    f"{TORCH_FILE} and {MODEL_FILE}",
    *(f"{name}: {step}" for name in (ENCODER_FILE, DECODER_FILE) for step in ONNX_STEPS),
    "writing",
)
"""Steps of an export into a folder."""


def write_bundle(model: Model, folder: Path, begin: Begin = silent) -> dict[str, Any]:
    """Write all files of an export into a folder.

    All files are renamed to their final names together, after the ONNX files were checked. Files of an older export
    that this one doesn't replace are removed.

    Args:
        model: model to export, on the CPU.
        folder: folder that passed `check_folder`; made if it doesn't exist.
        begin: called with each of STEPS.

    Returns:
        `files` (name -> `bytes`, `sha256`), `checks` (ONNX file -> comparison with torch), `onnx` (ONNX file ->
        format and limits), `left_out` (file -> reason) and `warnings`.

    Raises:
        PredictError: the ONNX export failed, or a file can't be written.
    """
    begin(STEPS[0])
    known, warnings = _describe_model(model)
    content: dict[str, bytes] = {}
    left_out = {}
    reason = unsupported_reason(model)
    if reason is None:
        content[TORCH_FILE] = marked(export_torch(model), EXPORT)
    else:
        left_out[TORCH_FILE] = reason
    content[MODEL_FILE] = _safetensors(model, known)
    encoder = export_encoder(model, ENCODER_FILE, lambda step: begin(f"{ENCODER_FILE}: {step}"))
    decoder = export_decoder(model, DECODER_FILE, lambda step: begin(f"{DECODER_FILE}: {step}"))
    content |= {ENCODER_FILE: marked(encoder.data, EXPORT), DECODER_FILE: marked(decoder.data, EXPORT)}
    description = {
        "format": FORMAT,
        **known,
        "checks": {ENCODER_FILE: encoder.check(), DECODER_FILE: decoder.check()},
        "onnx": {ENCODER_FILE: encoder.format(), DECODER_FILE: decoder.format()},
        "left_out": left_out,
    }
    warning = size_warning(model) if reason is None else None
    warnings += [] if warning is None else [f"{TORCH_FILE}: {warning}"]
    content[CARD_FILE] = marked(model_card(description, warnings).encode(), EXPORT)
    description["files"] = {name: describe_file(data) for name, data in content.items()}
    content[DESCRIPTION_FILE] = marked(json.dumps(description, indent=1).encode() + b"\n", EXPORT)
    begin(STEPS[-1])
    _write(folder, content)
    return {
        "files": {name: describe_file(data) for name, data in content.items()},
        "checks": description["checks"],
        "onnx": description["onnx"],
        "left_out": left_out,
        "warnings": warnings,
    }


def _write(folder: Path, content: Mapping[str, bytes]) -> None:
    with Outputs() as outputs:
        outputs.make_folder(folder, "--out")
        description = read_description(folder / DESCRIPTION_FILE, FORMAT)
        stale = [path for path in folder.iterdir() if path.name in FILES or is_partial(path)]
        # A kill between the renames leaves model.safetensors, which has no mark, beside a card, which has one.
        for name in sorted(content, key=_rename_order):
            data = content[name]
            refuse = partial(_refuse_changed, folder / name, description)
            outputs.add_unmarked(folder / name, data, "--out", refuse)
        outputs.commit(stale)


def _rename_order(name: str) -> int:
    return {MODEL_FILE: 1, DESCRIPTION_FILE: 2}.get(name, 0)


def describe_file(data: bytes) -> dict[str, Any]:
    """Return a file's size in bytes and hexadecimal SHA-256, as `bytes` and `sha256`."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _safetensors(model: Model, known: Mapping[str, Any]) -> bytes:
    """Return the content of model.safetensors, from which `load_student` and `load_model` rebuild the model."""
    state = model.sam.state_dict()
    head = {key: value for key, value in state.items() if key.startswith(HEAD_PREFIXES)}
    kept = {key: known[key] for key in ("data", "metrics") if known[key] is not None}
    # save_student renames its file at once; here it must be renamed together with others.
    with (
        explain_os_errors(Path(gettempdir()), PredictError, "a temporary file"),
        TemporaryDirectory(prefix="mobilesam-") as folder,
    ):
        path = Path(folder) / MODEL_FILE
        info = {**model.info, **kept}
        save_student(model.sam.image_encoder, path, model.student, model.image_size, info, head)
        return path.read_bytes()


def _describe_model(model: Model) -> tuple[dict[str, Any], list[str]]:
    """Return the model's description as JSON values, None where nothing is recorded, and warnings for its users."""
    info, warnings = model.info, list(model.notes)
    metrics, data = _object(info.get("metrics")), _object(info.get("data"))
    if model.run is not None:
        split = model.run.split
        data = {
            "images_trained": len(split.train),
            "images_held_out": len(split.val),
            "store_id": model.run.description.data.store_id,
        }
        try:
            metrics = _metrics(model)
        except DistillError as error:
            warnings.append(f"the run's metrics were left out: {error}")
    sizes: dict[str, int] = {"encoder": 0, "head": 0}
    for key, value in model.sam.named_parameters():
        sizes["encoder" if key.startswith(ENCODER_PREFIX) else "head"] += value.numel()
    teacher = info.get("teacher")
    known = {
        "student": model.student,
        "image_size": model.image_size,
        "student_size": model.student_size,
        "parameters": sizes,
        "preprocessing": preprocessing_recipe(model.student_size),
        "teacher": None
        if teacher is None
        else {"name": teacher, "checkpoint_sha256": info.get("checkpoint_sha256")},
        # The name without its folders: an export must not show paths of this machine.
        "head": Path(model.head_source).name,
        "data": data,
        "metrics": metrics,
        **{name: info.get(name) for name in ("run", "run_id", "epoch", "step")},
        "init": _object(info.get("init")),
        "trained_with": _object(info.get("versions")),
        "versions": versions(),
    }
    return known, warnings


def _object(value: Any) -> dict[str, Any] | None:
    """Return `value` if it is a JSON object, else None: a student file from elsewhere may hold anything."""
    return value if isinstance(value, dict) else None


def _metrics(model: Model) -> dict[str, Any] | None:
    """Return the validation metrics of the epoch in which the student was saved; None if there are none."""
    assert model.run is not None
    lines = [line for line in model.run.history() if line["kind"] == "val"]
    found = next((line for line in reversed(lines) if line["step"] == model.info.get("step")), None)
    return None if found is None else {key: value for key, value in found.items() if key != "kind"}
