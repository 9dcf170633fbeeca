"""Students: a registry of encoders, and the file that one is saved in, from which it rebuilds itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..sam.tiny_vit import TinyViT
from .errors import DistillError
from .tensor_file import Header, check_tensors, load_tensors, save_tensors

STUDENT_FILE = "student.safetensors"
FORMAT = "mobilesam student 1"

MEND = "put back a whole copy, or run distill again"

# As in mobile_sam.pt, so that student.safetensors and sam_head.safetensors together have that file's keys.
KEY_PREFIX = "image_encoder."


@dataclass(frozen=True, kw_only=True)
class StudentInfo:
    """One kind of student. `build` takes the image size in pixels and gives an encoder of normalised pixels
    (B, 3, S, S) to embeddings (B, 256, S/16, S/16), its weights drawn from torch's global generator.

    `training_bytes` is the memory that one training image takes at 1024 x 1024 beside the weights, by
    precision; it scales with the area.
    """

    name: str
    summary: str
    build: Callable[[int], nn.Module]
    training_bytes: Mapping[str, int]


STUDENTS: Mapping[str, StudentInfo] = {
    info.name: info
    for info in (
        StudentInfo(
            name="tiny_vit",
            summary="TinyViT-5M with SAM's neck: MobileSAM's encoder, 5.7 M parameters",
            build=TinyViT,
            # Slopes of the process's peak memory over the number of images, rounded up (measured on a CPU).
            training_bytes={"float32": 2_600_000_000, "bfloat16": 1_500_000_000},
        ),
    )
}


def student_info(name: str) -> StudentInfo:
    """The registry's entry; DistillError names those there are."""
    if name not in STUDENTS:
        raise DistillError(f"unknown student {name!r}; there are: {', '.join(STUDENTS)}")
    return STUDENTS[name]


def build_student(name: str, image_size: int, seed: int) -> nn.Module:
    """A new student on the CPU, its weights drawn from `seed`; torch's global generator is left as it was."""
    info = student_info(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return info.build(image_size)


def save_student(student: nn.Module, path: Path, name: str, image_size: int, info: Mapping[str, Any]) -> None:
    """Writes the weights (keys `image_encoder.*`) and what rebuilds them into one file, atomically.

    `info` is more to remember, as JSON values: which teacher, which run.
    """
    metadata = {
        "format": FORMAT,
        "student": name,
        "image_size": str(image_size),
        "info": json.dumps(info, sort_keys=True),
    }
    tensors = {
        KEY_PREFIX + key: value.detach().cpu().contiguous() for key, value in student.state_dict().items()
    }
    save_tensors(path, tensors, metadata)


def load_student(path: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Rebuilds a student from a run's folder or a student file, in evaluation mode on `device`.

    Returns it with its description: `student`, `image_size`, and what it was saved with. Raises DistillError
    when the file is missing, damaged (its SHA-256 says), not a student, or its weights don't fit the student it
    names; a file that claims more than that student's weights is refused before any is read.
    """
    file = Path(path) / STUDENT_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DistillError(f"no student at {file}; run distill first, or give a run or a {STUDENT_FILE}")
    try:
        header = check_tensors(file)
        info = _read_metadata(file, header.metadata)
        with torch.random.fork_rng(devices=[]):
            student = student_info(info["student"]).build(info["image_size"])
        wanted = {KEY_PREFIX + key: value for key, value in student.state_dict().items()}
        _check_names(file, info["student"], header, wanted)
        tensors = load_tensors(file)
    except OSError as error:
        raise DistillError(f"{file} can't be read: {error.strerror or error}") from error
    except DistillError as error:
        raise DistillError(f"{error}; {MEND}") from error
    _check_values(file, info["student"], tensors, wanted)
    student.load_state_dict({key.removeprefix(KEY_PREFIX): value for key, value in tensors.items()})
    return student.to(device).eval(), info


def _read_metadata(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    found = metadata.get("format")
    if found != FORMAT:
        found = None if found is None else found[:40]
        raise DistillError(f"{file} is not a student this version reads: format {found!r}, wanted {FORMAT!r}")
    try:
        name, image_size, info = (
            metadata["student"][:40],
            int(metadata["image_size"][:40]),
            json.loads(metadata["info"]),
        )
    except (KeyError, ValueError, RecursionError) as error:
        raise DistillError(f"{file} has damaged metadata ({str(error)[:100]})") from error
    # The size decides how large an encoder is built, so a forged one must not get that far.
    if not (16 <= image_size <= 16384) or image_size % 16 or not isinstance(info, dict):
        raise DistillError(f"{file} has damaged metadata (image size {image_size})")
    return {**info, "student": name, "image_size": image_size}


def _check_names(file: Path, name: str, header: Header, wanted: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(wanted.keys() - header.shapes), sorted(header.shapes.keys() - wanted)
    if missing or unknown:
        first = (missing or unknown)[0]
        raise DistillError(
            f"{file} does not hold a {name}: {len(missing)} weights missing, {len(unknown)} unknown, "
            f"the first is {first[:80]}"
        )
    for key, value in wanted.items():
        if header.shapes[key] != tuple(value.shape):
            got = str(header.shapes[key])[:80]
            raise DistillError(f"{file} does not hold a {name}: {key} is {got}, wanted {tuple(value.shape)}")


def _check_values(file: Path, name: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Types and values: load_state_dict would convert types in silence."""
    for key, value in wanted.items():
        got = tensors[key]
        if got.dtype != value.dtype:
            raise DistillError(
                f"{file} does not hold a {name}: {key} is {got.dtype}, wanted {value.dtype}; {MEND}"
            )
        if got.is_floating_point() and not bool(torch.isfinite(got).all()):
            raise DistillError(f"{file} holds values that aren't finite, in {key}; {MEND}")
