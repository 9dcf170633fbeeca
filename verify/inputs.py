"""Inputs of a verification: student, rows of a store, mean embedding that skill is measured against, heads for masks.

Shape suffixes: C channels, H and W rows and columns of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import VerifyError
from ..distill import ComputeSettings, DistillError, Run, load_student, mean_embedding
from ..distill.data.loader import check_preprocessing, image_root
from ..distill.loss.coupled import store_head
from ..distill.run_folder import CONFIG_FILE
from ..distill.students.student_file import STUDENT_FILE, lacks_image_size, trained_head
from ..sam.device import resolve_device, resolve_precision
from ..sam.modeling.head import SamHead, build_head
from ..store import EmbeddingStore
from .config import VerifyConfig

DEFAULT_STORE = Path("store.zarr")

BATCH_SIZES = {"cpu": 2, "cuda": 16}
"""Default number of images in a forward pass, by type of device."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Student:
    """A student's encoder, on its device, and what is known of it."""

    encoder: nn.Module
    info: Mapping[str, Any]
    """Description in the student's file: `student`, `image_size`, `teacher`, `epoch`, ..."""
    file: Path
    run: Run | None
    """None for a student's file away from its run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanEmbedding:
    """Constant prediction that skill is measured against."""

    mean_CHW: Tensor
    source: str
    """The rows that it is the mean of, in words."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """A student and a store that belong together, opened and checked. `store` is open: the caller closes it."""

    student: Student
    store: EmbeddingStore
    rows: Sequence[int]
    image_root: Path | None
    """Folder of the images; None: those that the store keeps."""
    mean: MeanEmbedding
    compute: ComputeSettings
    notes: list[str]
    """Facts that a reader of the numbers has to know."""

    def subject(self) -> dict[str, Any]:
        """Return the names of all that is compared, as plain JSON values."""
        run = self.student.run
        return {
            "student": self.student.info["student"],
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
    # A file that doesn't say its image size has to wait for the store; of any other, faults are reported first.
    loaded = None if run is None and lacks_image_size(file) else _load_student(run, file, device)
    store = EmbeddingStore.open(config.store or (DEFAULT_STORE if run is None else run.store_path))
    try:
        encoder, info = loaded or load_student(file, device, image_size=store.spec.image_size)
        _check_fit(info, store)
        student = Student(encoder=encoder, info=info, file=file, run=run)
        own_store = run is not None and run.description.data.store_id == store.spec.store_id
        rows = _rows(config, run, store, own_store)
        last_root = run.image_root if run is not None and own_store else None
        return Inputs(
            student=student,
            store=store,
            rows=rows,
            image_root=image_root(store, config.images, last_root, refusal=VerifyError),
            mean=_mean_embedding(run, store, rows),
            compute=_compute_settings(config, run, device),
            notes=_notes(student, store, own_store),
        )
    except BaseException:
        store.close()
        raise


def _find_student(config: VerifyConfig) -> tuple[Run | None, Path]:
    """Return the run, if there is one, and the student's file; a file in its run's folder belongs to the run."""
    path = config.student
    if path is not None and not path.is_dir():
        if path.name != STUDENT_FILE or not (path.parent / CONFIG_FILE).is_file():
            return None, path
        path = path.parent
    run = Run.open(path)
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


def _rows(config: VerifyConfig, run: Run | None, store: EmbeddingStore, own_store: bool) -> Sequence[int]:
    done = [record.row for record in store.manifest.records("done")]
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
    """Return the precision asked for, else the run's, so that the numbers are its trainer's, else the device's.

    The memory format is the trainer's for a run. A file alone may hold the teacher itself: in float32 it is run as
    precompute runs teachers, so that equal weights give equal numbers to the bit.
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
        notes.append(f"the store lacks {counts.pending} pending and {counts.failed} failed images")
    return notes


def open_head(store: EmbeddingStore, device: torch.device) -> SamHead:
    """Build the head that the store keeps, frozen, on a device.

    Raises:
        VerifyError: it isn't a SAM head; the message says how to continue without masks.
        StoreDamaged: its bytes are not those that were saved.
    """
    try:
        return store_head(store, device)
    except DistillError as error:
        raise VerifyError(f"{error}, so masks can't be compared: --points 0 goes on without them") from error


def open_student_head(student: Student, image_size: int, device: torch.device) -> SamHead | None:
    """Build the head that was trained with the student, frozen, on a device; None where it uses the teacher's."""
    state = trained_head(student.file)  # checked when the student was loaded
    return None if state is None else build_head(state, image_size).to(device)
