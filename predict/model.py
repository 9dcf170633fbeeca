"""The whole model: a student, or a teacher, with SAM's head behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from segment_anything.modeling import Sam
from torch import Tensor

from ..common.errors import DistillError, shown
from ..distill.run_folder import CONFIG_FILE, HEAD_FILE, Run
from ..distill.students.student_file import (
    FORMAT,
    MAX_HEADER,
    check_tensors,
    load_own_head,
    load_student,
    student_path,
    trained_head,
)
from ..sam import CheckpointError
from ..sam.checkpoint import read_state
from ..sam.device import resolve_device
from ..sam.download import Progress, find_checkpoint
from ..sam.modeling.head import SamHead, assemble, build_head
from ..sam.modeling.head_shapes import HEAD_PREFIXES
from ..sam.teacher import load_head, load_teacher
from ..sam.torch_file import in_torch_format
from ..store import EmbeddingStore

_MEND = "give --head with the store that it learned from, or with a SAM or MobileSAM checkpoint"


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A SAM that is ready to be prompted, and what is known of it.

    `sam` is segment_anything's class, in evaluation mode, float32, on `device`: `SamPredictor` takes it. `student` is
    the encoder's name in the registry, or the teacher's name. `info` is what the student's file says of itself
    (`teacher`, `run`, ...); empty for mobile_sam.pt. `head_source` is where the head came from. `notes` are what a
    user of the masks has to know.
    """

    sam: Sam
    student: str
    file: Path | None
    run: Run | None
    info: Mapping[str, Any]
    head_source: str
    device: torch.device
    notes: tuple[str, ...] = ()

    @property
    def image_size(self) -> int:
        """Side in pixels of the padded square that the encoder takes."""
        return self.sam.image_encoder.img_size


class NoHead(DistillError):
    """A student lies without a mask decoder."""


class _Head(NamedTuple):
    """A head's tensors and what is known of them; of the teacher only where a store gave them."""

    state: dict[str, Tensor]
    source: str
    teacher: str | None = None
    checkpoint_sha256: str | None = None


def load_model(
    student: Path | str | None = None,
    *,
    head: Path | str | None = None,
    fallback_head: Path | str | None = None,
    device: str = "cpu",
    image_size: int | None = None,
) -> Model:
    """A student as a whole SAM.

    Args:
        student: a run's or an export's folder, a student's file, or a file in mobile_sam.pt's format; None is
            runs/latest.
        head: a store, or a file with `prompt_encoder.*` and `mask_decoder.*` among its tensors: sam_head.safetensors,
            model.safetensors, or any SAM checkpoint. None: the student's own file, or what lies beside it in its run.
        fallback_head: likewise, where none of these has one.
        device: auto, cpu, cuda or cuda:i.
        image_size: in pixels, for a file in mobile_sam.pt's format, which doesn't say (1024 where None).

    Raises:
        DistillError, CheckpointError, StoreError: a file is missing or damaged, no head was found, it doesn't fit, or
            the student takes another image size.
    """
    where = resolve_device(device)
    run = _run(student)
    if run is not None:
        encoder, info = run.student(where)
        file = run.student_path
    else:
        assert student is not None, "without one it is the latest run"
        encoder, info = load_student(student, where, image_size=image_size)
        file = student_path(student)
    if image_size not in (None, info["image_size"]):
        raise DistillError(
            f"{file} takes images of {info['image_size']} pixels, not {image_size}: leave out --image-size"
        )
    found = _head(head, run, file, fallback_head)
    return Model(
        sam=assemble(encoder, _build(found, info["image_size"])).to(where),
        student=info["student"],
        file=file,
        run=run,
        info={key: value for key, value in info.items() if key not in ("student", "image_size")},
        head_source=found.source,
        device=where,
        notes=_notes(info, run, found),
    )


def load_teacher_model(
    teacher: str,
    checkpoint: Path | None = None,
    *,
    device: str = "cpu",
    image_size: int = 1024,
    download: Progress | None = None,
) -> Model:
    """A teacher as a whole SAM; `checkpoint` as `find_checkpoint` takes it, `download` its progress.

    Raises SamError.
    """
    file = find_checkpoint(teacher, checkpoint, progress=download)
    loaded = load_teacher(teacher, file, image_size=image_size, device=device)
    head = build_head(load_head(teacher, file), image_size)
    return Model(
        sam=assemble(loaded.image_encoder, head).to(loaded.device),
        student=teacher,
        file=file,
        run=None,
        info={"teacher": teacher},
        head_source=f"{teacher}'s own",
        device=loaded.device,
    )


def _run(student: Path | str | None) -> Run | None:
    """The run that was meant, if it is one: None is the latest; a file in a run's folder belongs to the run."""
    if student is None:
        return Run.open()
    path = Path(student)
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG_FILE).is_file():
        return None
    run = Run.open(folder)
    return run if path.is_dir() or path.resolve() == run.student_path else None


def _head(head: Path | str | None, run: Run | None, file: Path, fallback: Path | str | None) -> _Head:
    if head is not None:
        return _given_head(Path(head))
    trained = trained_head(file)
    if trained is not None:
        return _Head(trained, str(file))
    if run is not None:
        return _Head(_decode(run.read_head(), run.head_path), str(run.head_path))
    own = load_own_head(file)
    if own is not None:
        return _Head(own, str(file))
    beside = file.parent / HEAD_FILE
    if beside.is_file():
        return _given_head(beside)
    if fallback is not None:
        return _given_head(Path(fallback))
    raise NoHead(f"{file} holds no mask decoder, and there is no {HEAD_FILE} beside it: {_MEND}")


def _build(head: _Head, image_size: int) -> SamHead:
    try:
        return build_head(head.state, image_size)
    except CheckpointError as error:
        raise DistillError(f"{head.source} is {error}; {_MEND}") from error


def _notes(info: Mapping[str, Any], run: Run | None, head: _Head) -> tuple[str, ...]:
    notes: list[str] = []
    if run is not None:
        notes += run.unfinished(info)
    learned, own = info.get("checkpoint_sha256"), head.checkpoint_sha256
    if None not in (learned, own) and learned != own:
        notes.append(
            f"the head is another teacher's: {head.teacher} with checkpoint {str(own)[:12]}..., the student learned "
            f"from {info.get('teacher')} with {str(learned)[:12]}..."
        )
    return tuple(notes)


def read_head(path: Path) -> dict[str, Tensor]:
    """The head in a store, a safetensors file or a SAM checkpoint, float32; other tensors in it don't matter.

    Raises DistillError, StoreError or CheckpointError when there is none, or the file is missing or
    damaged.
    """
    return _given_head(path).state


def _given_head(path: Path) -> _Head:
    if path.is_dir():
        with EmbeddingStore.open(path) as store:
            return _Head(
                _decode(store.read_head(), store.head_path),
                str(path),
                store.spec.teacher,
                store.spec.checkpoint_sha256,
            )
    if not path.is_file():
        raise DistillError(f"there is no file or store {shown(str(path))}; {_MEND}")
    if _is_safetensors(path):
        return _Head(_read_safetensors(path), str(path))
    return _Head(_only_head(read_state(path), path), str(path))


def _is_safetensors(path: Path) -> bool:
    """By its content: a JSON object after the length; by its name where that says nothing."""
    with _readable(path), path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" or (path.suffix == ".safetensors" and not in_torch_format(start))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The head's tensors alone, mapped; a file of save_student's is checked against its SHA-256."""
    with _readable(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise DistillError(
                f"{path} is damaged: a header of {length:,} bytes, {MAX_HEADER:,} at most; {_MEND}"
            )
    try:
        with _readable(path), safe_open(path, framework="pt", device="cpu") as opened:
            if (opened.metadata() or {}).get("format") == FORMAT:
                check_tensors(path)
            names = [name for name in opened.keys() if name.startswith(HEAD_PREFIXES)]  # noqa: SIM118 - not a dict
            return _only_head({name: opened.get_tensor(name) for name in names}, path)
    except SafetensorError as error:
        raise DistillError(f"{path} is damaged ({str(error)[:100]}); {_MEND}") from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DistillError(f"{path} can't be read: {error.strerror or error}") from error


def _decode(data: bytes, path: Path) -> dict[str, Tensor]:
    """The head of a file whose SHA-256 was checked."""
    try:
        return _only_head(load(data), path)
    except SafetensorError as error:
        raise DistillError(f"{path} is damaged ({str(error)[:100]}); {_MEND}") from error


def _only_head(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    head = {key: value for key, value in state.items() if key.startswith(HEAD_PREFIXES)}
    if not head:
        raise DistillError(f"{path} holds no mask decoder; {_MEND}")
    for key, value in head.items():
        if not value.is_floating_point():
            raise DistillError(f"{path} is no SAM head: {key[:80]} holds {value.dtype} numbers; {_MEND}")
        if not bool(torch.isfinite(value.float()).all()):
            raise DistillError(f"{path} holds values that aren't finite, in {key[:80]}; {_MEND}")
    return {key: value.float() for key, value in head.items()}
