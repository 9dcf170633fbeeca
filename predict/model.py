"""Loading of a student or a teacher as a whole SAM, ready for prompts.

`load_model` takes a student in any of these forms, recognised by content, not by name:

- None: the latest run, runs/latest;
- a run's folder, or the student.safetensors in it;
- an export's folder, or the model.safetensors in it, which includes a head;
- a student.safetensors without its run;
- a file or folder of MobileSAM's weights from any program, a tiny_vit with its head.

`_open_student` reads each of them; `head_source.py` then finds SAM's head for it, in the student's file or elsewhere.
`load_teacher_model` takes a teacher's name and checkpoint instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from segment_anything.modeling import Sam
from torch import nn

from ..common.errors import DistillError, HeadNotFound
from ..distill.run_description import is_run, student_path
from ..distill.run_folder import Run
from ..distill.students.student_file import load_student
from ..sam.device import resolve_device
from ..sam.modeling.head import SamHead, assemble, build_head
from ..sam.modeling.hq import HqEncoder, build_hq_head
from ..sam.modeling.neck import input_side
from ..sam.modeling.vit import ViTEncoder
from ..sam.registry import find_teacher_info, find_teacher_package, hq_note
from ..sam.teacher import load_head, load_teacher
from ..sam.teacher_package import PackageEncoder
from ..sam.weights.download import Progress, find_checkpoint
from .head_source import LoadedHead, find_head, read_head_file

_OWN_FIELDS = ("student", "image_size", "student_size", "note")
"""Keys of a student's description that a model has in other places."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """Whole SAM with its metadata."""

    sam: Sam
    """segment_anything's class, in evaluation mode, float32, on `device`; for `StudentPredictor`, and if
    `student_size` is `image_size` also for segment_anything's own `SamPredictor`."""
    student: str
    """The encoder's name in the registry of students, or the teacher's name."""
    file: Path | None
    """File of the encoder; None for the teacher that is part of this package."""
    run: Run | None
    """Run that the file belongs to; None without a run."""
    info: Mapping[str, Any]
    """Description in the student's file (`teacher`, `run`, ...); empty for a file in mobile_sam.pt's format."""
    head_source: str
    """File or store of the head; empty if there is none."""
    device: torch.device
    notes: tuple[str, ...] = ()
    """Warnings for users of the masks, one sentence each."""

    @property
    def image_size(self) -> int:
        """Side in pixels of SAM's square, the frame of prompts and masks."""
        return self.sam.image_encoder.img_size

    @property
    def student_size(self) -> int:
        """Side in pixels of the encoder's input."""
        return input_side(self.sam.image_encoder, self.image_size)


def load_model(
    student: Path | str | None = None,
    *,
    head: Path | str | None = None,
    fallback_head: Path | str | None = None,
    needs_head: bool = True,
    device: str = "cpu",
    image_size: int | None = None,
) -> Model:
    """Load a student as a whole SAM.

    Args:
        student: folder of a run or an export, a student's file, or a file in mobile_sam.pt's format; None:
            runs/latest.
        head: store, or file with `prompt_encoder.*` and `mask_decoder.*` among its tensors: sam_head.safetensors,
            model.safetensors, or any SAM checkpoint. None: the head in the student's own file, or in its run or
            folder.
        fallback_head: store or file as for `head`, used if neither the student's file nor its folder has a head.
        needs_head: if False and no head is found, the model gets one of random weights, and `head_source` is empty:
            for use of the encoder alone.
        device: "auto", "cpu", "cuda" or "cuda:i".
        image_size: side of the encoder's square in pixels, for a file in mobile_sam.pt's format, which doesn't record
            it (None: 1024); for other files it must agree with the recorded size.

    Raises:
        HeadNotFound: a head is needed, and none was found.
        DistillError, CheckpointError, StoreError: a file is missing or damaged, the head doesn't fit, or the student
            has another image size.
    """
    target = resolve_device(device)
    encoder, info, file, run = _open_student(student, target, image_size)
    size = info["image_size"]
    if image_size not in (None, size):
        raise DistillError(f"{file} takes images of {size} pixels, not {image_size}: leave out --image-size")
    try:
        found = find_head(file, run, given=head, fallback=fallback_head)
    except HeadNotFound:
        if needs_head:
            raise
        found = LoadedHead(state=SamHead(size).state_dict(), source="")
    return Model(
        sam=assemble(encoder, found.build(size)).to(target),
        student=info["student"],
        file=file,
        run=run,
        info={key: value for key, value in info.items() if key not in _OWN_FIELDS},
        head_source=found.source,
        device=target,
        notes=_notes(info, run, found),
    )


class _Student(NamedTuple):
    """Encoder from a student's file, before its head is found."""

    encoder: nn.Module
    info: Mapping[str, Any]  # as `load_student` returns it
    file: Path
    run: Run | None


def _open_student(student: Path | str | None, device: torch.device, image_size: int | None) -> _Student:
    """Read a student in one of the forms listed at the top of this module."""
    run = _find_run(student)
    if run is not None:
        encoder, info = run.student(device)
        return _Student(encoder, info, run.student_path, run)
    assert student is not None, "None is the latest run"
    encoder, info = load_student(student, device, image_size=image_size)
    return _Student(encoder, info, student_path(student), None)


def _find_run(student: Path | str | None) -> Run | None:
    """Return the run if `student` is a run's folder or the student's file in one, else None."""
    if student is None:
        return Run.open()
    path = Path(student)
    folder = path if path.is_dir() else path.parent
    if not is_run(folder):
        return None
    run = Run.open(folder)
    return run if path.is_dir() or path.resolve() == run.student_path else None


def _notes(info: Mapping[str, Any], run: Run | None, head: LoadedHead) -> tuple[str, ...]:
    notes: list[str] = []
    if run is not None:
        notes += run.unfinished(info)
    notes += [note for note in (info.get("note"), head.note) if note is not None]
    if (note := hq_note(info.get("teacher"))) is not None:
        notes.append(note)
    learned, own = info.get("checkpoint_sha256"), head.checkpoint_sha256
    if None not in (learned, own) and learned != own:
        notes.append(
            f"the head is another teacher's: {head.teacher} with checkpoint {str(own)[:12]}..., the student learned "
            f"from {info.get('teacher')} with {str(learned)[:12]}..."
        )
    return tuple(notes)


def load_teacher_model(
    teacher: str,
    checkpoint: Path | None = None,
    *,
    head: Path | None = None,
    device: str = "cpu",
    image_size: int = 1024,
    download: Progress | None = None,
) -> Model:
    """Load a teacher as a whole SAM.

    SAM-HQ's teachers decode with SAM-HQ's head: one mask per prompt, whether or not several are asked for.

    Args:
        teacher: name in the registry of teachers, or of another package's teacher.
        checkpoint: checkpoint's file; None: the file in the cache, downloaded if missing (see `find_checkpoint`).
        head: store or file with SAM's head, for a teacher of another package.
        device: "auto", "cpu", "cuda" or "cuda:i".
        image_size: side of the encoder's square in pixels; position tables are interpolated if it isn't the size of
            the teacher's training.
        download: called with (bytes done, bytes in total) during a download.

    Raises:
        SamError: the checkpoint is missing, damaged or of another architecture, or could not be downloaded.
        HeadNotFound: the teacher is of another package, has no mask head, and none is given.
        DistillError, StoreError: the given head is missing or damaged.
    """
    if find_teacher_package(teacher) is not None:
        return _load_package_model(teacher, checkpoint, head, device, image_size)
    file = find_checkpoint(teacher, checkpoint, progress=download)
    loaded = load_teacher(teacher, file, image_size=image_size, device=device)
    own = load_head(teacher, file, with_hq=True)
    features = find_teacher_info(teacher).hq_features
    if features is None:
        sam = assemble(loaded.image_encoder, build_head(own, image_size))
    else:
        assert isinstance(loaded.image_encoder, ViTEncoder), "SAM-HQ's encoders are ViTs"
        sam = assemble(HqEncoder(loaded.image_encoder), build_hq_head(own, image_size, features))
    return Model(
        sam=sam.to(loaded.device),
        student=teacher,
        file=file,
        run=None,
        info={"teacher": teacher},
        head_source=f"{teacher}'s own",
        device=loaded.device,
        notes=() if loaded.note is None else (loaded.note,),
    )


def _load_package_model(
    teacher: str, checkpoint: Path | None, head: Path | None, device: str, image_size: int
) -> Model:
    """Load another package's teacher with the given head, else with its own."""
    loaded = load_teacher(teacher, checkpoint, image_size=image_size, device=device)
    encoder, package = loaded.image_encoder, loaded.package
    assert isinstance(encoder, PackageEncoder), "made by load_teacher for other packages' teachers"
    own = encoder.head_state() if head is None else None
    if head is not None:
        found = read_head_file(head)
    elif own is not None:
        found = LoadedHead(state=own, source=f"{teacher}'s own")
    else:
        raise HeadNotFound(
            f"the teacher {teacher} of {package} has no mask head (no head_state()): give --head with a store or "
            "file that has SAM's head for its embeddings"
        )
    return Model(
        sam=assemble(encoder, found.build(image_size)).to(loaded.device),
        student=teacher,
        file=checkpoint,
        run=None,
        info={"teacher": teacher, "package": str(package)},
        head_source=found.source,
        device=loaded.device,
    )


def size_words(result: Mapping[str, Any]) -> str:
    """Return the size of a model's images: `1024`, or `512 (of 1024)` for a student of smaller inputs.

    Args:
        result: `student_size` and `image_size`, the sides of the encoder's input and of SAM's square in pixels.
    """
    size, square = result["student_size"], result["image_size"]
    return f"{size}" if size == square else f"{size} (of {square})"
