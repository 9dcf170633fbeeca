"""Content of the web demo: page, networks, onnxruntime-web, examples, and demo.json, which the page reads."""

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
from ....sam import preprocessing_recipe
from ...model import Model
from ...outputs import EXPORT
from ..onnx_encoder import INPUT
from ..onnx_graph import Session
from .examples import Example
from .folder import DESCRIPTION_FILE, FORMAT, HEADERS
from .runtime import BUILDS, LICENCE_FILE, WebRuntime

ENCODER_PATH, DECODER_PATH = "networks/encoder.onnx", "networks/decoder-lowres.onnx"
PAGE = (
    "index.html",
    "app.css",
    "app.mjs",
    "engine.mjs",
    "scene.mjs",
    "stage.mjs",
    "worker.mjs",
    "masks.mjs",
    "preprocess.mjs",
)
"""Files of the page, copied from `page/`."""

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Networks:
    """ONNX files of the page, with half weights."""

    encoder: bytes
    decoder: bytes
    """Decoder that ends at low-resolution masks."""


def demo_content(
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
    content = {name: (page / name).read_bytes() for name in PAGE}
    content |= {ENCODER_PATH: networks.encoder, DECODER_PATH: networks.decoder}
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
        "check": _check_values(networks.encoder, model.student_size),
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


def size_note(student_size: int) -> str | None:
    """Return a warning for a student whose input is so large that a photo takes seconds in a browser; else None."""
    if student_size <= LARGE:
        return None
    seconds = 4.4 * (student_size / 1024) ** 2  # a TinyViT on one core of a server
    return (
        f"at {student_size} pixels a photo takes a browser about {seconds:.0f} s on one thread: "
        f"for a quicker page train with --student-size {LARGE}"
    )
