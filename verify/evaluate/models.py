"""Loading of the models that `--model NAME=FILE` and `--teacher` name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...common.config import expand_home
from ...common.errors import HeadNotFound, VerifyError, shown
from ...distill import Run
from ...distill.run_description import STUDENT_FILE, student_path
from ...distill.students.registry import outline_student, student_info
from ...distill.students.student_file import is_own_file
from ...predict.model import Model, load_model, load_teacher_model
from ...sam import CheckpointError
from ...sam.registry import EMBEDDED_TEACHER, TEACHERS
from ...sam.weights.checkpoint import describe_other, identify_teacher, read_weights
from ...sam.weights.download import Progress
from ...sam.weights.weight_files import FOLDER_FILES, absent
from .plugins import LICENCE, installed_predictors, open_fastsam, open_predictor
from .predictor import Predictor
from .sam_predictor import EncoderPredictor

FASTSAM = "fastsam"
"""Name of a model, or prefix before a colon, by which a file is taken for FastSAM's weights."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """Model ready for prompts, with its metadata."""

    predictor: Predictor
    kind: str
    """Name of the student or teacher in its registry, "FastSAM", or the entry point's name."""
    file: str | None
    sam: Model | None = None
    """SAM of `predictor`, with its run and description; None for models of other packages."""
    licence: str | None = None
    needs_photos: bool = False
    """True if the model needs images at their original size, not the resized ones that a store keeps."""
    notes: tuple[str, ...] = ()
    """Warnings about how to read the model's numbers."""

    @property
    def name(self) -> str:
        """Name of the model in the evaluation."""
        return self.predictor.name

    @property
    def run(self) -> Run | None:
        """Run that the model belongs to; None without one."""
        return None if self.sam is None else self.sam.run

    @property
    def trained_on(self) -> tuple[str | None, str | None]:
        """Ids of the training's store and run; None where the file doesn't record them."""
        info = {} if self.sam is None else self.sam.info
        return info.get("store_id"), info.get("run_id")

    def to_json(self) -> dict[str, Any]:
        """Return the model's names and sources as JSON values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "file": self.file,
            "image_size": None if self.sam is None else self.sam.image_size,
            "student_size": None if self.sam is None else self.sam.student_size,
            "head": None if self.sam is None else self.sam.head_source,
            "run": None if self.run is None else self.run.path.name,
            "licence": self.licence,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class ModelLoader:
    """Loader of models, on one device."""

    device: torch.device
    image_size: int
    """Side in pixels of the encoder's square, for files that don't record theirs."""
    head: Path | None = None
    """Store or file whose head is used for a model that has none elsewhere."""

    def load(self, name: str, value: str) -> LoadedModel:
        """Load the model that `--model NAME=FILE` names; its kind is recognised by content.

        Args:
            name: name of the model in the evaluation; with the name "fastsam", the file is FastSAM's weights.
            value: folder of a run or an export, a student's file, a file in mobile_sam.pt's format, a SAM
                checkpoint; "vit_nano"; "fastsam:FILE"; or "PREDICTOR:FILE" with an entry point of
                `mobilesam.predictors`.

        Raises:
            VerifyError: there is no such file or entry point, or the file isn't a model.
            DistillError, CheckpointError, StoreError: the file is damaged or doesn't fit.
        """
        value = expand_home(value)
        before, colon, after = value.partition(":")
        path = Path(value)
        if colon and before == FASTSAM:
            return self._load_fastsam(name, Path(after))
        if colon and not path.exists() and before in (points := installed_predictors()):
            predictor = open_predictor(name, points[before], Path(after), self.device)
            return LoadedModel(predictor=predictor, kind=before, file=after, needs_photos=True)
        if name == FASTSAM:
            return self._load_fastsam(name, path)
        if value == EMBEDDED_TEACHER and not path.exists():
            return self.load_teacher(name, EMBEDDED_TEACHER, None)
        if not path.exists():
            raise VerifyError(
                f"--model {shown(name)}: {shown(value)} {absent(path, _alternatives(before, colon))}"
            )
        found = None if _is_student_folder(path) else _checkpoint(name, student_path(path))
        if found is not None and not TEACHERS[found].student_format:
            return self.load_teacher(name, found, path)
        return self._load_student(name, path)

    def load_teacher(
        self, name: str, teacher: str, file: Path | None, download: Progress | None = None
    ) -> LoadedModel:
        """Load a teacher as a whole SAM.

        Args:
            name: name of the model in the evaluation.
            teacher: name in the registry of teachers.
            file: checkpoint's file; None: the file in the cache, downloaded if missing.
            download: called with (bytes done, bytes in total) during a download.

        Raises:
            SamError: the checkpoint is missing, damaged or of another architecture, or could not be downloaded.
        """
        model = load_teacher_model(
            teacher,
            file,
            head=None if teacher in TEACHERS else self.head,
            device=str(self.device),
            image_size=self.image_size,
            download=download,
        )
        return self._from_sam(name, model)

    def _load_student(self, name: str, path: Path) -> LoadedModel:
        try:
            model = load_model(
                path, fallback_head=self.head, device=str(self.device), image_size=self._size_of(path)
            )
        except HeadNotFound:
            raise VerifyError(
                f"--model {shown(name)}: there is no mask decoder for {shown(str(path))}: give its run's folder, "
                "--store with the store that it was trained on, or --head"
            ) from None
        return self._from_sam(name, model)

    def _size_of(self, path: Path) -> int | None:
        return None if _is_student_folder(path) or is_own_file(student_path(path)) else self.image_size

    def _from_sam(self, name: str, model: Model) -> LoadedModel:
        outline = (
            None
            if "package" in model.info
            else partial(outline_encoder, model.student, model.image_size, model.student_size)
        )
        return LoadedModel(
            predictor=EncoderPredictor(name, model.sam, outline, self.device),
            kind=model.student,
            file=None if model.file is None else str(model.file),
            sam=model,
            notes=model.notes,
        )

    def _load_fastsam(self, name: str, file: Path) -> LoadedModel:
        return LoadedModel(
            predictor=open_fastsam(name, file, self.device),
            kind="FastSAM",
            file=str(file),
            licence=f"ultralytics: {LICENCE}",
            needs_photos=True,
            notes=(
                "segments everything, then selects among those masks; its time is for segmenting everything",
            ),
        )


def outline_encoder(kind: str, image_size: int, student_size: int | None = None) -> nn.Module:
    """Build an encoder on the meta device, for counting parameters and operations.

    Args:
        kind: name of a student or a teacher in its registry.
        image_size: side of SAM's square in pixels.
        student_size: side of a student's input in pixels; None: `image_size`.
    """
    if kind in TEACHERS:
        return TEACHERS[kind].encoder.outline(image_size)
    return outline_student(student_info(kind), image_size, student_size)


def _is_student_folder(path: Path) -> bool:
    """Return True for a folder of this package, a run's or an export's; False for a file, or another program's
    folder."""
    if not path.is_dir():
        return False
    return (path / STUDENT_FILE).exists() or not any((path / name).is_file() for name in FOLDER_FILES)


def _checkpoint(name: str, path: Path) -> str | None:
    """Return the name of the teacher whose weights a file of another program holds; None for a file of this one's."""
    if is_own_file(path):
        return None
    known = [teacher for teacher, info in TEACHERS.items() if not info.embedded]
    try:
        weights = read_weights(path)
    except CheckpointError as error:
        if "(ultralytics." not in str(error):  # the module of a pickled class
            raise
        first = str(error).splitlines()[0]
        raise VerifyError(f"--model {shown(name)}: {first}\n{_fastsam(name, path)}") from None
    found = identify_teacher(weights.state)
    if found not in known:
        yolo = any(key.startswith("model.0.conv.") for key in weights.state)
        raise VerifyError(
            f"--model {shown(name)}: {shown(str(path))} holds none of {', '.join(known[:-1])} and {known[-1]}: "
            f"{describe_other(weights)}" + (f"\n{_fastsam(name, path)}" if yolo else "")
        )
    return found


def _fastsam(name: str, path: Path) -> str:
    return f"for FastSAM's weights write {shown(name)}={FASTSAM}:{shown(str(path))}"


def _alternatives(before: str, colon: str) -> str:
    """Return the end of a message with alternatives; for a value with a colon, the installed entry points."""
    if not colon:
        return f"give a run, an export, a student's file, a SAM checkpoint, or {EMBEDDED_TEACHER}"
    names = ", ".join(sorted(installed_predictors())) or "none"
    return f"no installed package has a predictor {shown(before)!r} (there are: {names})"
