"""`mobilesam export --format web`: gather what the page needs, make the networks, write the folder.

The folder holds the page, the networks, onnxruntime-web, examples, and demo.json, which the page reads.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....common.outputs import marked
from ....distill.run_description import is_run
from ....distill.students.student_file import lacks_image_size
from ....sam import preprocessing_recipe
from ....sam.weights.download import Progress
from ...config import ExportConfig
from ...model import Model
from ...outputs import EXPORT
from ..bundle import describe_file
from ..onnx_encoder import INPUT
from ..onnx_graph import Begin, Session
from .examples import Example, read_examples
from .folder import DESCRIPTION_FILE, FORMAT, HEADERS, check_demo_folder, write_demo_folder
from .networks import NETWORK_STEPS, Networks, export_networks
from .runtime import BUILDS, LICENCE_FILE, WebRuntime, find_runtime

ENCODER_PATH, DECODER_PATH = "networks/encoder.onnx", "networks/decoder-lowres.onnx"
CHECKED = 64
"""Values of the encoder's output for black pixels in demo.json, by which the page checks WebGPU."""

LARGE = 512
"""Side of the encoder's input in pixels above which a photo takes seconds in a browser."""

README = """\
# {student} in the browser

Open this folder by a web server, not as a file: `mobilesam demo {name}`, or any server of static files. Photos stay
in the browser.

- With the two headers in `_headers` (which Netlify and Cloudflare Pages read) the page computes with several threads;
  without them it works, with one. `mobilesam demo` sends them.
- `networks/`: encoder and decoder, their weights as float16. `demo.json`: sizes and preprocessing. `runtime/`:
  onnxruntime-web, MIT licence beside it. Nothing is fetched from elsewhere.
- {student} at {student_size} pixels{teacher}. `mobilesam export --out DIR` writes the model card.
"""

WEB_SIZE = 512
"""Side of the encoder's input in pixels for files that don't record it: 1024 takes a browser four times as long."""

STEPS = (*NETWORK_STEPS, "writing")
"""Steps of `export_web`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WebParts:
    """Everything of a web demo that doesn't depend on the model."""

    runtime: WebRuntime
    examples: list[Example]


def gather(config: ExportConfig, download: Progress | None = None) -> WebParts:
    """Check the folder, read the examples, and find onnxruntime-web's files: everything that may fail early.

    Args:
        config: all options of the export.
        download: called during a download with the bytes received so far and the bytes in all.

    Raises:
        PredictError: the folder can't be written or replaced, or a file of the runtime is missing or damaged.
        ImageError: an example is no photo.
        DownloadError: onnxruntime-web could not be downloaded.
    """
    check_demo_folder(config.out)
    examples = read_examples(config.examples)
    return WebParts(runtime=find_runtime(config.runtime_dir, download), examples=examples)


def web_image_size(student: Path | None, image_size: int | None) -> int | None:
    """Return the image size to load a student with: WEB_SIZE for a file that doesn't record it, if none is given.

    Args:
        student: run, export or file; None for the latest run.
        image_size: the user's choice in pixels.
    """
    if image_size is not None or student is None or is_run(student) or not student.is_file():
        return image_size
    return WEB_SIZE if lacks_image_size(student) else None


def export_web(model: Model, out: Path, parts: WebParts, begin: Begin) -> dict[str, Any]:
    """Write a web demo.

    Args:
        model: model on the CPU, with a head.
        out: folder that passed `check_demo_folder`.
        parts: as `gather` returns them.
        begin: called with each of STEPS.

    Returns:
        `files`, `checks`, `onnx`, `left_out` and `warnings`, as of other exports; files by their paths in the folder.

    Raises:
        PredictError: a network can't be exported, differs from torch, or a file can't be written.
    """
    networks = export_networks(model, begin)
    content = _content(model, out, networks, parts.runtime, parts.examples)
    begin(STEPS[-1])
    write_demo_folder(out, content)
    made = {ENCODER_PATH: networks.encoder, DECODER_PATH: networks.decoder}
    note = _size_note(model.student_size)
    return {
        "files": {path: describe_file(data) for path, data in content.items()},
        "checks": {path: file.check() for path, file in made.items()},
        "onnx": {path: file.format() for path, file in made.items()},
        "left_out": {},
        "warnings": [*model.notes, *parts.runtime.notes, *([] if note is None else [note])],
    }


def _content(
    model: Model, folder: Path, networks: Networks, runtime: WebRuntime, examples: list[Example]
) -> dict[str, bytes]:
    """Return the content of all files of a web demo by their paths in the folder, demo.json the last.

    Args:
        model: model that the networks were made of.
        folder: the demo's folder, whose name the README mentions.
        networks: both ONNX files.
        runtime: onnxruntime-web's files.
        examples: pictures of the page.
    """
    page = package_files(__package__) / "page"
    content = {file.name: file.read_bytes() for file in page.iterdir()}
    content |= {
        ENCODER_PATH: marked(networks.encoder.data, EXPORT),
        DECODER_PATH: marked(networks.decoder.data, EXPORT),
    }
    content |= {f"runtime/{name}": data for name, data in runtime.files.items()}
    content[f"runtime/{LICENCE_FILE}"] = runtime.licence
    listed = []
    for number, example in enumerate(examples, 1):
        path = f"examples/{number}.jpg"
        content[path] = example.data
        width, height = example.size
        listed.append({"path": f"./{path}", "alt": example.text, "width": width, "height": height})
    content["_headers"] = "\n".join(
        ["/*", *(f"  {name}: {value}" for name, value in HEADERS.items()), ""]
    ).encode()
    teacher = model.info.get("teacher")
    content["README.md"] = README.format(
        student=model.student,
        student_size=model.student_size,
        teacher="" if teacher is None else f", distilled from {teacher}",
        name=folder.name,
    ).encode()

    def described(path: str) -> dict[str, Any]:
        return {"path": f"./{path}", "bytes": len(content[path])}

    builds = {
        build: {
            kind: described(f"runtime/{name}")
            for kind, name in zip(("script", "program"), BUILDS[build], strict=True)
        }
        for build in runtime.builds
    }
    description = {
        "format": FORMAT,
        "student": model.student,
        "teacher": teacher,
        "image_size": model.image_size,
        "student_size": model.student_size,
        "preprocessing": preprocessing_recipe(model.student_size),
        "files": {"encoder": described(ENCODER_PATH), "decoder": described(DECODER_PATH)},
        "runtime": {"version": runtime.version, "webgpu": None, **builds},
        "examples": listed,
        "check": _check_values(networks.encoder.data, model.student_size),
        "listing": {path: hashlib.sha256(data).hexdigest() for path, data in content.items()},
    }
    content[DESCRIPTION_FILE] = marked(json.dumps(description, indent=1).encode() + b"\n", EXPORT)
    return content


def _check_values(encoder: bytes, size: int) -> dict[str, Any]:
    """Return every `step`th value of the encoder's output for black pixels (after normalising, zeros)."""
    (embedding,) = Session(encoder).run({INPUT: torch.zeros(1, 3, size, size)})
    values = embedding.numpy().ravel()
    step = max(1, len(values) // CHECKED)
    return {"step": step, "values": [float(value) for value in np.round(values[::step][:CHECKED], 6)]}


def _size_note(student_size: int) -> str | None:
    """Return a warning for a student whose input is so large that a photo takes seconds in a browser; else None."""
    if student_size <= LARGE:
        return None
    seconds = 4.4 * (student_size / 1024) ** 2  # a TinyViT on one core of a server
    return (
        f"at {student_size} pixels a photo takes a browser about {seconds:.0f} s on one thread: "
        f"for a quicker page train with --student-size {LARGE}"
    )
