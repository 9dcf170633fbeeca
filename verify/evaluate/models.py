"""Opening what `--model NAME=FILE` and `--teacher` name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import nn

from ...common.errors import HeadNotFound, VerifyError, shown
from ...distill import Run
from ...distill.students.registry import outline_student, student_info
from ...predict.model import Model, load_model, load_teacher_model
from ...sam import CheckpointError
from ...sam.checkpoint import identify_teacher, read_state
from ...sam.download import Progress
from ...sam.modeling.head_shapes import WIDTH
from ...sam.modeling.vit import ViTConfig
from ...sam.registry import EMBEDDED_TEACHER, TEACHERS
from ...sam.torch_file import in_torch_format
from .plugins import LICENCE, installed_predictors, open_fastsam, open_predictor
from .predictor import Contender
from .sam_predictor import SamContender

FASTSAM = "fastsam"
"""The name, or the word before a colon, that says that a file is FastSAM's."""

CHECKPOINTS = tuple(name for name, info in TEACHERS.items() if not info.embedded)
"""Teachers whose checkpoint a file of torch's format may be."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A model ready to be asked, and what is known of it."""

    contender: Contender
    kind: str
    """What it is: a student's or teacher's name, FastSAM, or an entry point's name."""
    file: str | None
    image_size: int | None = None
    head: str | None = None
    """Where its mask decoder came from."""
    run: Run | None = None
    store_id: str | None = None
    """Of the store that it was trained on, where its file says so; likewise `run_id`."""
    run_id: str | None = None
    licence: str | None = None
    needs_photos: bool = False
    """Whether resized pictures, as a store keeps them, won't do."""
    notes: tuple[str, ...] = ()

    def names(self) -> dict[str, Any]:
        """What it is, as JSON values."""
        return {
            "name": self.contender.name,
            "kind": self.kind,
            "file": self.file,
            "image_size": self.image_size,
            "head": self.head,
            "run": None if self.run is None else self.run.path.name,
            "licence": self.licence,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class Opener:
    """Opens models on one device.

    `image_size` in pixels is for files that don't say theirs, `store` is where a student's head is looked for last.
    """

    device: torch.device
    image_size: int
    store: Path | None = None

    def open(self, name: str, value: str) -> Opened:
        """A model as `--model` names it, told by its content.

        `value` is a run's or an export's folder, a student's file, a file of mobile_sam's or of a SAM checkpoint;
        vit_nano; `fastsam:FILE`, for which the name fastsam will do as well; or the name of an entry point of
        `mobilesam.predictors` with a colon and a file. Raises VerifyError, and the errors of whatever opens it.
        """
        before, colon, after = value.partition(":")
        path = Path(value)
        if colon and before == FASTSAM:
            return self._fastsam(name, Path(after))
        if colon and not path.exists() and before in (points := installed_predictors()):
            contender = open_predictor(name, points[before], Path(after), self.device)
            return Opened(contender=contender, kind=before, file=after, needs_photos=True)
        if name == FASTSAM:
            return self._fastsam(name, path)
        if value == EMBEDDED_TEACHER and not path.exists():
            return self.teacher(name, EMBEDDED_TEACHER, None)
        if not path.exists():
            raise VerifyError(f"--model {shown(name)}: there is no {shown(value)}{_meant(before, colon)}")
        found = None if path.is_dir() else _checkpoint(name, path)
        if found is not None and found != "mobile_sam":
            return self.teacher(name, found, path)
        return self._student(name, path)

    def teacher(self, name: str, teacher: str, file: Path | None, download: Progress | None = None) -> Opened:
        """A SAM by its teacher's name; without a file it is looked for as precompute does."""
        model = load_teacher_model(
            teacher, file, device=str(self.device), image_size=self.image_size, download=download
        )
        return self._of_model(name, model)

    def _student(self, name: str, path: Path) -> Opened:
        try:
            model = load_model(
                path, fallback_head=self.store, device=str(self.device), image_size=self._size_of(path)
            )
        except HeadNotFound:
            raise VerifyError(
                f"--model {shown(name)}: {shown(str(path))} lies without a mask decoder: give its run's folder, or "
                "--store with the store that it learned from"
            ) from None
        return self._of_model(name, model)

    def _size_of(self, path: Path) -> int | None:
        return None if path.is_dir() or not _in_torch_format(path) else self.image_size

    def _of_model(self, name: str, model: Model) -> Opened:
        outline = partial(outline_encoder, model.student, model.image_size)
        return Opened(
            contender=SamContender(name, model.sam, outline, self.device),
            kind=model.student,
            file=None if model.file is None else str(model.file),
            image_size=model.image_size,
            head=model.head_source,
            run=model.run,
            store_id=model.info.get("store_id"),
            run_id=model.info.get("run_id"),
            notes=model.notes,
        )

    def _fastsam(self, name: str, file: Path) -> Opened:
        return Opened(
            contender=open_fastsam(name, file, self.device),
            kind="FastSAM",
            file=str(file),
            licence=f"ultralytics: {LICENCE}",
            needs_photos=True,
            notes=("segments everything, then chooses among those masks; its time is that of everything",),
        )


def outline_encoder(kind: str, image_size: int) -> nn.Module:
    """An encoder without its memory, to be counted. In a teacher's place mobile_sam is called so, too."""
    architecture = TEACHERS[kind].encoder if kind in TEACHERS else None
    if isinstance(architecture, ViTConfig):
        # SAM's own class: ours does the same with other multiplications, and published counts are of the former.
        with torch.device("meta"):
            return _upstream_vit(architecture, image_size)
    return outline_student(student_info("tiny_vit" if kind in TEACHERS else kind), image_size)


def _upstream_vit(config: ViTConfig, image_size: int) -> ImageEncoderViT:
    """Source: segment_anything/build_sam.py."""
    return ImageEncoderViT(
        img_size=image_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        out_chans=WIDTH,
        qkv_bias=True,
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=config.global_blocks,
    )


def _checkpoint(name: str, path: Path) -> str | None:
    """Which SAM a file of torch's format holds; None for one of another format."""
    if not _in_torch_format(path):
        return None
    found = identify_teacher(read_state(path))
    if found not in CHECKPOINTS:
        raise VerifyError(
            f"--model {shown(name)}: {shown(str(path))} holds none of {', '.join(CHECKPOINTS[:-1])} and "
            f"{CHECKPOINTS[-1]}; for FastSAM's weights write {shown(name)}={FASTSAM}:{shown(str(path))}"
        )
    return found


def _in_torch_format(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return in_torch_format(file.read(9))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None


def _meant(before: str, colon: str) -> str:
    """What installed entry points there are, for a value that may name one."""
    if not colon:
        return f"; give a run, an export, a student's file, a SAM checkpoint, or {EMBEDDED_TEACHER}"
    there = ", ".join(sorted(installed_predictors())) or "none"
    return f", and no installed package has a predictor {shown(before)!r} (there are: {there})"
