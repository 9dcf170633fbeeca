"""Inputs of a verification: student, rows of a store, mean embedding as the baseline of skill, heads for masks.

Shape suffixes: C channels, H and W rows and columns of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import VerifyError, counted
from ..distill import ComputeSettings, DistillError, Run, load_student, mean_embedding
from ..distill.data.loader import check_preprocessing, find_image_root
from ..distill.data.rows import RecordsByRow
from ..distill.loss.coupled import store_head
from ..distill.run_description import STUDENT_FILE, is_run, student_path
from ..distill.students.student_file import lacks_image_size, trained_head
from ..predict.head_source import read_head_file
from ..sam.device import resolve_device, resolve_precision
from ..sam.modeling.head import SamHead, build_head
from ..store import EmbeddingStore, ImageRecord
from .config import VerifyConfig

DEFAULT_STORE = Path("store.zarr")

BATCH_SIZES = {"cpu": 2, "cuda": 16}
"""Default number of images in a forward pass, by type of device."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Student:
    """Student's encoder on its device, with its metadata."""

    encoder: nn.Module
    info: Mapping[str, Any]
    """Description in the student's file: `student`, `image_size`, `student_size`, `teacher`, `epoch`, ..."""
    file: Path
    run: Run | None
    """Run that the file belongs to; None for a file outside a run's folder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanEmbedding:
    """Mean embedding, the constant prediction that is the baseline of skill."""

    mean_CHW: Tensor
    """float32 (256, g, g)."""
    source: str
    """Description of the rows averaged over."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """Student and store, opened and checked to fit together. The caller closes `store`."""

    student: Student
    store: EmbeddingStore
    records: Mapping[int, ImageRecord]
    """Records of the store's committed rows, by row."""
    rows: Sequence[int]
    """Rows of the store to compare."""
    image_root: Path | None
    """Folder of the images; None: the images that the store keeps."""
    mean: MeanEmbedding
    compute: ComputeSettings
    notes: list[str]
    """Warnings about how to read the numbers."""

    def describe(self) -> dict[str, Any]:
        """Describe the comparison as plain JSON values: student, store, precision, device, notes."""
        run = self.student.run
        return {
            "student": self.student.info["student"],
            "student_size": self.student.info["student_size"],
            "file": str(self.student.file),
            "run": None if run is None else run.path.name,
            "teacher": self.store.spec.teacher,
            "store": str(self.store.path),
            "precision": self.compute.precision,
            "device": str(self.compute.device),
            "mean_embedding": self.mean.source,
            "notes": self.notes,
        }


def open_inputs(config: VerifyConfig) -> Inputs:
    """Find and open the student and the store, and check that they can be compared.

    Raises:
        VerifyError: they can't be compared: no split, no committed rows, another image size or another store.
        DistillError, StoreError: one of them is missing or damaged.
    """
    run, file = _find_student(config)
    device = resolve_device(config.device)
    # A file that doesn't record its image size is loaded after the store; others before it, so that their faults are
    # reported first.
    loaded = None if run is None and lacks_image_size(file) else _load_student(run, file, device)
    store = EmbeddingStore.open(config.store or (DEFAULT_STORE if run is None else run.store_path))
    try:
        encoder, info = loaded or load_student(file, device, image_size=store.spec.image_size)
        _check_fit(info, store)
        student = Student(encoder=encoder, info=info, file=file, run=run)
        own_store = run is not None and run.description.data.store_id == store.spec.store_id
        records = RecordsByRow(store)
        rows = _rows(config, run, store, list(records), own_store)
        last_root = run.image_root if run is not None and own_store else None
        return Inputs(
            student=student,
            store=store,
            records=records,
            rows=rows,
            image_root=find_image_root(store, config.images, last_root, refusal=VerifyError),
            mean=_mean_embedding(run, store, rows),
            compute=_compute_settings(config, run, device),
            notes=_notes(student, store, own_store),
        )
    except BaseException:
        store.close()
        raise


def _find_student(config: VerifyConfig) -> tuple[Run | None, Path]:
    """Return the run, if any, and the student's file; a student file in a run's folder belongs to the run."""
    folder = path = config.student
    if path is not None:
        folder = path if path.is_dir() else path.parent
        if not is_run(folder) or (folder != path and path.name != STUDENT_FILE):
            return None, student_path(path)
    run = Run.open(folder)
    return run, run.student_path


def _load_student(run: Run | None, file: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    return load_student(file, device) if run is None else run.student(device)


def _check_fit(info: Mapping[str, Any], store: EmbeddingStore) -> None:
    size = store.spec.image_size
    if info["image_size"] != size:
        raise VerifyError(
            f"the student takes images of {info['image_size']} pixels, {store.path} holds embeddings of {size}: "
            "give a store of the student's size with --store"
        )
    check_preprocessing(store, refusal=VerifyError)


def _rows(
    config: VerifyConfig, run: Run | None, store: EmbeddingStore, done: Sequence[int], own_store: bool
) -> Sequence[int]:
    if config.split == "all":
        rows: Sequence[int] = done
    elif run is None:
        raise VerifyError(
            f"{config.student} is without its run, so its {config.split} rows aren't known: "
            "give --split all, or the run's folder"
        )
    elif not own_store:
        raise VerifyError(
            f"{store.path} is not the store that {run.path.name} was trained on, so its {config.split} rows "
            "mean nothing there: give --split all"
        )
    else:
        rows = run.split.val if config.split == "val" else run.split.train
    missing = len(set(rows) - set(done))
    if missing or not rows:
        counts = store.manifest.counts()
        raise VerifyError(
            f"{store.path} lacks {missing or 'all'} of the rows to compare ({counts.done} done, "
            f"{counts.pending} pending, {counts.failed} failed): run precompute to the end first"
        )
    return rows


def _mean_embedding(run: Run | None, store: EmbeddingStore, rows: Sequence[int]) -> MeanEmbedding:
    if run is None:
        return MeanEmbedding(mean_CHW=mean_embedding(store, rows), source="all committed rows of the store")
    return MeanEmbedding(mean_CHW=run.mean_embedding(), source="the run's training rows")


def _compute_settings(config: VerifyConfig, run: Run | None, device: torch.device) -> ComputeSettings:
    """Choose precision, batch size and memory format.

    The precision is the requested one; for "auto" the run's, so that the numbers equal the trainer's; without a run
    the one that the device is faster in. The memory format of a run is the trainer's. A file without a run may
    contain the teacher itself: in float32 it is computed as in precompute, so that equal weights give bit-identical
    embeddings.
    """
    asked = config.precision
    if asked == "auto" and run is not None:
        asked = run.description.resolved.precision
    precision = resolve_precision(asked, device)
    as_teacher = run is None and precision == "float32"
    return ComputeSettings(
        device=device,
        precision=precision,
        batch_size=config.batch_size or BATCH_SIZES[device.type],
        memory_format=torch.contiguous_format if as_teacher else torch.channels_last,
    )


def _notes(student: Student, store: EmbeddingStore, own_store: bool) -> list[str]:
    info, run = student.info, student.run
    notes: list[str] = []
    if run is None:
        notes.append("the student came without its run: skill is against the mean of all rows of the store")
    elif not own_store:
        notes.append(
            "not the store that the student was trained on: skill is against its training rows' mean"
        )
    if info.get("checkpoint_sha256") not in (None, store.spec.checkpoint_sha256):
        notes.append(
            f"the student was trained on another teacher, {info.get('teacher')} with checkpoint "
            f"{str(info['checkpoint_sha256'])[:12]}..., this store's is {store.spec.checkpoint_sha256[:12]}..."
        )
    if run is not None:
        notes += run.unfinished(info)
    counts = store.manifest.counts()
    if counts.pending or counts.failed:
        notes.append(f"the store lacks {counts.pending} pending and {counted(counts.failed, 'failed image')}")
    return notes


def no_masks(store: EmbeddingStore, given: Path | None) -> str | None:
    """Return the reason why no masks can be made of a store's embeddings; None if they can.

    Args:
        store: store open for reading.
        given: store or file with a head, as the user named it.
    """
    if store.spec.head_sha256 is not None or given is not None:
        return None
    return (
        f"{store.path} has no mask head, since its teacher {store.spec.teacher} gave none: give --head with a store "
        "or file that has SAM's head"
    )


def open_head(store: EmbeddingStore, device: torch.device, given: Path | None = None) -> SamHead:
    """Build the head that the user gave, else the store's, frozen.

    Args:
        store: store open for reading.
        device: device of the head.
        given: store or file with a head; None for the store's own.

    Raises:
        VerifyError: it isn't a SAM head; the message says how to continue without masks.
        StoreDamaged: the file is not what was stored.
        DistillError, CheckpointError, StoreError: the given head is missing or damaged.
    """
    if given is not None:
        return read_head_file(given).build(store.spec.image_size).to(device)
    try:
        return store_head(store, device)
    except DistillError as error:
        raise VerifyError(f"{error}, so masks can't be compared: --points 0 leaves them out") from error


def open_student_head(student: Student, image_size: int, device: torch.device) -> SamHead | None:
    """Build the head that was trained with the student, frozen.

    Args:
        student: the student; its file has been checked by loading it.
        image_size: side of the encoder's square in pixels.
        device: device of the head.

    Returns:
        The head; None if the student uses the teacher's head.
    """
    state = trained_head(student.file)  # checked when the student was loaded
    return None if state is None else build_head(state, image_size).to(device)
