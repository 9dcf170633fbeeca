"""Student file: a safetensors file with weights and the metadata to rebuild a student; also mobile_sam.pt's format.

A student file, like every tensor file of a run, carries a SHA-256 of its metadata, names, dtypes, shapes and bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ...common.durable import write_atomic
from ...common.errors import DistillError, counted
from ...sam.modeling.head_shapes import HEAD_PREFIXES, head_shapes
from ...sam.modeling.neck import input_side
from ...sam.teacher import inspect_checkpoint, load_head, load_teacher
from ...sam.weights.checkpoint import ENCODER_PREFIX
from ...sam.weights.torch_file import ZIP_MAGIC
from ..run_description import STUDENT_FILE, student_path
from .registry import outline_student, student_info

FORMAT = "mobilesam student 1"

TRAINED_HEAD = "trained_head"
"""Key in a student's description, true if the file holds a head that was trained with the student."""

MEND = "put back a whole copy, or run distill again"

MAX_HEADER = 1 << 20
"""Largest header accepted, in bytes: thirty times TinyViT's. The format allows 100 MB."""

_DIGEST_KEY = "sha256"
_CHUNK = 1 << 20


def save_student(
    student: nn.Module,
    path: Path,
    name: str,
    image_size: int,
    info: Mapping[str, Any],
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a student's weights, and the metadata to rebuild it, into one file, atomically and durably.

    The keys are mobile_sam.pt's, `image_encoder.*`, so that student.safetensors and sam_head.safetensors together
    have that file's keys.

    Args:
        student: encoder, on any device.
        path: file to create or replace.
        name: the student's name in the registry, or `timm:NAME`.
        image_size: side of SAM's square in pixels; that of the student's input is the student's own (`input_side`).
        info: further JSON values to save, such as teacher and run.
        head: SAM's head (keys `prompt_encoder.*` and `mask_decoder.*`); with it the file is a whole SAM.
    """
    student_size = input_side(student, image_size)
    metadata = {
        "format": FORMAT,
        "student": name,
        "image_size": str(image_size),
        **({} if student_size == image_size else {"student_size": str(student_size)}),
        "info": json.dumps(info, sort_keys=True),
    }
    tensors = {ENCODER_PREFIX + key: value for key, value in student.state_dict().items()} | dict(head or {})
    save_tensors(path, {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, metadata)


def load_student(
    path: Path | str, device: torch.device | str = "cpu", *, image_size: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a student from its file, in evaluation mode on `device`.

    Names and shapes are compared before the student is built or any weight is read.

    Args:
        path: student's file, or the folder of a run or an export; or a file or folder of MobileSAM's weights from
            any program (`read_weights`).
        device: device of the student.
        image_size: side of SAM's square in pixels, for a file in mobile_sam.pt's format, which is a tiny_vit
            and doesn't record its image size; None: 1024. Ignored for other files.

    Returns:
        The student, and its description: `student`, `image_size`, `student_size` (side of its input in pixels), and
        the `info` that it was saved with. For weights from another program, `note` is a sentence about what was taken
        of the file, if there is anything to say.

    Raises:
        DistillError: the file is missing, damaged (its SHA-256 differs) or not a student, its weights don't fit the
            student that it names, or that student needs timm, which isn't installed.
        CheckpointError: a file of another program isn't mobile_sam's.
    """
    file = student_path(path)
    if not is_own_file(file):
        teacher = load_teacher("mobile_sam", file, image_size=image_size or 1024, device=device)
        note = {} if teacher.note is None else {"note": teacher.note}
        sizes = {"image_size": teacher.image_size, "student_size": teacher.image_size}
        return teacher.image_encoder, {"student": "tiny_vit", **sizes, **note}
    with _mend_added(file):
        header = check_tensors(file)
        info = _read_metadata(file, header.metadata)
    wanted = _outline(file, info)
    with _mend_added(file):
        shapes = {key: tuple(value.shape) for key, value in wanted.items()} | _head_shapes(header)
        _check_names(file, info["student"], header, shapes)
        tensors = load_tensors(file)
    _check_values(file, info["student"], tensors, {key: value.dtype for key, value in wanted.items()})
    with torch.random.fork_rng(devices=[]):
        student = student_info(info["student"]).build(info["image_size"], info["student_size"])
    student.load_state_dict({key.removeprefix(ENCODER_PREFIX): tensors[key] for key in wanted})
    return student.to(device).eval(), info


def load_own_head(path: Path | str) -> dict[str, Tensor] | None:
    """Return the head in a student's own file, keyed as in SAM's checkpoints, on the CPU; None if it has none.

    Call `load_student` with `path` first: it checks the file.

    Raises:
        CheckpointError: a file of another program isn't mobile_sam's.
    """
    file = student_path(path)
    if not is_own_file(file):
        return load_head("mobile_sam", file) if inspect_checkpoint("mobile_sam", file).has_head else None
    head = {key: value for key, value in load_tensors(file).items() if key.startswith(HEAD_PREFIXES)}
    return head or None


def trained_head(path: Path | str) -> dict[str, Tensor] | None:
    """Return the head that was trained with a student, from its own file, float32, keyed as in SAM's checkpoints.

    A file in mobile_sam.pt's format doesn't record whether its head was trained with its encoder: its head is
    returned. The file's SHA-256 is not checked here; `load_student` and `read_initial` do that.

    Returns:
        The head; None if the student uses the teacher's head, or the file is not a student file.

    Raises:
        DistillError: the file is damaged.
        CheckpointError: a file of another program is damaged.
    """
    file = student_path(path)
    if not is_own_file(file):
        return load_own_head(file)
    return load_own_head(file) if (describe_student(file) or {}).get(TRAINED_HEAD) else None


def describe_student(file: Path) -> dict[str, Any] | None:
    """Return the description in a file that mobilesam wrote, as `load_student` does; None if it holds no student.

    Args:
        file: path of the file (`is_own_file`); its SHA-256 is not checked.

    Raises:
        DistillError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise DistillError(f"{file} is damaged ({str(error)[:100]}); {MEND}") from error
    return _read_metadata(file, metadata) if metadata.get("format") == FORMAT else None


def lacks_image_size(path: Path | str) -> bool:
    """Return True if a student's file is in mobile_sam.pt's format, which doesn't record the image size.

    Raises:
        DistillError: there is no such file, or it can't be read.
    """
    return not is_own_file(student_path(path))


def is_own_file(path: Path) -> bool:
    """Return True if mobilesam wrote a file of tensors, which then carries a SHA-256, even if it is damaged now.

    Raises:
        DistillError: there is no such file, or it can't be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8 + MAX_HEADER)
    except OSError as error:
        raise DistillError(f"{path} can't be read: {error.strerror or error}") from error
    if start.startswith(ZIP_MAGIC):
        return False
    # Two marks, so that one damaged byte doesn't hide both; of a file that lost both the name decides.
    return b'"mobilesam ' in start or b'"sha256"' in start or path.name == STUDENT_FILE


@dataclass(frozen=True)
class Header:
    """Header of a tensor file: metadata without its digest, and each tensor's shape."""

    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata as safetensors, with their SHA-256, atomically and durably.

    Args:
        path: file to create or replace.
        tensors: tensors by name, contiguous, on the CPU.
        metadata: strings by name, without `sha256`.
    """
    tensors, metadata = dict(tensors), dict(metadata)
    data = save(tensors, metadata)
    length = int.from_bytes(data[:8], "little")
    digest = _digest(json.loads(data[8 : 8 + length]), [memoryview(data)[8 + length :]])
    write_atomic(path, save(tensors, {**metadata, _DIGEST_KEY: digest}))


def check_tensors(path: Path) -> Header:
    """Check a file's SHA-256 over metadata, names, dtypes, shapes and bytes, reading a megabyte at a time.

    Raises:
        DistillError: the file is damaged or carries no SHA-256; the caller adds a remedy to the message.
        OSError: it can't be read.
    """
    with open(path, "rb") as file:
        header = _read_header(path, file)
        try:
            metadata = {str(name): str(value) for name, value in header["__metadata__"].items()}
            shapes = {name: tuple(header[name]["shape"]) for name in header.keys() - {"__metadata__"}}
            wanted = metadata.pop(_DIGEST_KEY)
        except (KeyError, TypeError, AttributeError):
            raise DistillError(
                f"{path} carries no SHA-256 of its content: mobilesam didn't write it"
            ) from None
        header["__metadata__"] = metadata
        if _digest(header, iter(lambda: file.read(_CHUNK), b"")) != wanted:
            raise DistillError(f"{path} is damaged: its SHA-256 isn't the one it was written with")
    return Header(metadata=metadata, shapes=shapes)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file to the CPU; call `check_tensors` first to verify the bytes.

    Raises:
        DistillError: header and content don't match.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise DistillError(f"{path} is damaged ({str(error)[:100]})") from error


def read_own_tensors(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Read tensors of a file that mobilesam wrote (`is_own_file`) to the CPU; its SHA-256 is checked.

    Args:
        path: path of the file.
        prefixes: beginnings of the names to read; the other tensors stay on the disk.

    Raises:
        DistillError: the file is damaged; the caller adds a remedy to the message.
        OSError: it can't be read.
    """
    check_tensors(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            names = [name for name in opened.keys() if name.startswith(prefixes)]  # noqa: SIM118 - not a dict
            return {name: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise DistillError(f"{path} is damaged ({str(error)[:100]})") from error


@contextmanager
def _mend_added(file: Path) -> Iterator[None]:
    """Add a remedy to errors about the file's content; turn an OSError into a DistillError."""
    try:
        yield
    except OSError as error:
        raise DistillError(f"{file} can't be read: {error.strerror or error}") from error
    except DistillError as error:
        raise DistillError(f"{error}; {MEND}") from error


def _outline(file: Path, info: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the named student's weights by their keys in a file, on the meta device.

    If the student can't be built, the error doesn't suggest another copy of the file, which wouldn't help.
    """
    try:
        student = outline_student(student_info(info["student"]), info["image_size"], info["student_size"])
    except DistillError as error:
        raise DistillError(f"{file} can't be rebuilt: {error}") from error
    return {ENCODER_PREFIX + key: value for key, value in student.state_dict().items()}


def _head_shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a whole head if the file has any part of one, else none."""
    if not any(key.startswith(HEAD_PREFIXES) for key in header.shapes):
        return {}
    return {key: tuple(shape) for key, shape in head_shapes().items()}


def _read_metadata(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    found = metadata.get("format")
    if found != FORMAT:
        found = None if found is None else found[:40]
        raise DistillError(f"{file} is not a student this version reads: format {found!r}, wanted {FORMAT!r}")
    try:
        name, image_size, info = (
            metadata["student"][:100],
            int(metadata["image_size"][:40]),
            json.loads(metadata["info"]),
        )
        student_size = int(metadata.get("student_size", str(image_size))[:40])
    except (KeyError, ValueError, RecursionError) as error:
        raise DistillError(f"{file} has damaged metadata ({str(error)[:100]})") from error
    # Checked before the encoder is built: a forged size could ask for a huge one.
    if not (16 <= image_size <= 16384) or image_size % 16 or not isinstance(info, dict):
        raise DistillError(f"{file} has damaged metadata (image size {image_size})")
    return {**info, "student": name, "image_size": image_size, "student_size": student_size}


def _check_names(file: Path, name: str, header: Header, wanted: Mapping[str, tuple[int, ...]]) -> None:
    missing, unknown = sorted(wanted.keys() - header.shapes), sorted(header.shapes.keys() - wanted)
    if missing or unknown:
        first = (missing or unknown)[0]
        raise DistillError(
            f"{file} does not hold a {name}: {counted(len(missing), 'weight')} missing, {len(unknown)} unknown, "
            f"the first is {first[:80]}"
        )
    for key, shape in wanted.items():
        if header.shapes[key] != shape:
            got = str(header.shapes[key])[:80]
            raise DistillError(f"{file} does not hold a {name}: {key} is {got}, wanted {shape}")


def _check_values(
    file: Path, name: str, tensors: Mapping[str, Tensor], encoder: Mapping[str, torch.dtype]
) -> None:
    """Refuse other dtypes, which load_state_dict would convert silently, and values that aren't finite."""
    for key, got in tensors.items():
        wanted = encoder.get(key, torch.float32)
        if got.dtype != wanted:
            raise DistillError(
                f"{file} does not hold a {name}: {key} is {got.dtype}, wanted {wanted}; {MEND}"
            )
        if got.is_floating_point() and not bool(torch.isfinite(got).all()):
            raise DistillError(f"{file} holds values that aren't finite, in {key}; {MEND}")


def _header_length(path: Path, file: BinaryIO) -> int:
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise DistillError(
            f"{path} is damaged or no safetensors file: a header of {length:,} bytes, {MAX_HEADER:,} at most"
        )
    return length


def _read_header(path: Path, file: BinaryIO) -> dict[str, Any]:
    length = _header_length(path, file)
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise DistillError(f"{path} is damaged or no safetensors file: its header is no JSON object")
    return header


def _digest(header: Mapping[str, Any], data: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of the header, its keys sorted, and of all bytes after it."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    sha256 = hashlib.sha256(text.encode() + b"\n")
    for chunk in data:
        sha256.update(chunk)
    return sha256.hexdigest()
