"""What is compared: a student, the rows of a store, and the mean embedding that skill is measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import VerifyError
from ..distill import ComputeSettings, DistillError, Run, load_student, mean_embedding
from ..distill.data.image_root import check_preprocessing, image_root
from ..distill.loss.objectives import store_head
from ..distill.run_folder import CONFIG_FILE
from ..distill.students.student_file import STUDENT_FILE, lacks_image_size, trained_head
from ..sam.device import resolve_device, resolve_precision
from ..sam.modeling.head import SamHead, build_head
from ..store import EmbeddingStore
from .config import VerifyConfig

DEFAULT_STORE = Path("store.zarr")
BATCH_SIZES = {"cpu": 2, "cuda": 16}
"""Default number of images in a forward pass, by type of device."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A student and a store that belong together, opened and checked. `store` is open: close it."""

    student: nn.Module
    info: Mapping[str, Any]
    """What the student's file says of itself: `student`, `image_size`, `teacher`, `epoch`, ..."""
    file: Path
    run: Run | None
    """None for a student's file away from its run."""
    store: EmbeddingStore
    image_root: Path | None
    rows: Sequence[int]
    mean_CHW: Tensor
    mean_source: str
    compute: ComputeSettings
    """Device, precision, batch size and memory format that the student is run in."""
    notes: list[str]
    """What a reader of the numbers has to know."""

    def names(self) -> dict[str, Any]:
        """What was compared, as plain JSON values."""
        return {
            "student": self.info["student"],
            "file": str(self.file),
            "run": None if self.run is None else self.run.path.name,
            "teacher": self.store.spec.teacher,
            "store": str(self.store.path),
            "precision": self.compute.precision,
            "device": str(self.compute.device),
            "mean_embedding": self.mean_source,
            "notes": self.notes,
        }


def open_subject(config: VerifyConfig) -> Subject:
    """Finds and opens student and store, and checks that they can be compared.

    Raises VerifyError when they can't: no split, no committed rows, another image size or store; DistillError
    and StoreError when one of them is missing or damaged.
    """
    run, file = _find_student(config)
    device = resolve_device(config.device)
    # A file that doesn't say its image size has to wait for the store; any other tells its own faults first.
    loaded = None if run is None and lacks_image_size(file) else _load(run, file, device)
    store = EmbeddingStore.open(config.store or (DEFAULT_STORE if run is None else run.store_path))
    try:
        student, info = loaded or load_student(file, device, image_size=store.spec.image_size)
        _check_fit(info, store)
        own_store = run is not None and run.config["data"]["store_id"] == store.spec.store_id
        rows = _rows(config, run, store, own_store)
        if run is None:
            mean_CHW, mean_source = mean_embedding(store, rows), "all committed rows of the store"
        else:
            mean_CHW, mean_source = run.mean_embedding(), "the run's training rows"
        precision = _precision(config, run, device)
        return Subject(
            student=student,
            info=info,
            file=file,
            run=run,
            store=store,
            image_root=image_root(
                store,
                config.images,
                run.image_root if run is not None and own_store else None,
                refusal=VerifyError,
            ),
            rows=rows,
            mean_CHW=mean_CHW,
            mean_source=mean_source,
            compute=ComputeSettings(
                device=device,
                precision=precision,
                batch_size=config.batch_size or BATCH_SIZES[device.type],
                memory_format=_memory_format(run, precision),
            ),
            notes=_notes(info, run, store, own_store),
        )
    except BaseException:
        store.close()
        raise


def _find_student(config: VerifyConfig) -> tuple[Run | None, Path]:
    """The run, if there is one, and the student's file: a file that lies in its run's folder belongs to it."""
    path = config.student
    if path is not None and not path.is_dir():
        if path.name != STUDENT_FILE or not (path.parent / CONFIG_FILE).is_file():
            return None, path
        path = path.parent
    run = Run.open(path)
    return run, run.student_path


def _load(run: Run | None, file: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
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


def _precision(config: VerifyConfig, run: Run | None, device: torch.device) -> str:
    """As asked, else the run's, so that the numbers are those the trainer logged, else the device's."""
    if config.precision == "auto" and run is not None:
        return resolve_precision(run.config["resolved"]["precision"], device)
    return resolve_precision(config.precision, device)


def _memory_format(run: Run | None, precision: str) -> torch.memory_format:
    """The trainer's for a run. A file alone may hold the teacher itself: in float32 it is run as precompute runs
    teachers, so that equal weights give equal numbers to the bit."""
    return torch.contiguous_format if run is None and precision == "float32" else torch.channels_last


def _notes(info: Mapping[str, Any], run: Run | None, store: EmbeddingStore, own_store: bool) -> list[str]:
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


# --- The heads that masks are compared with.


def open_head(store: EmbeddingStore, device: torch.device) -> SamHead:
    """As `store_head`; VerifyError says how to go on without masks."""
    try:
        return store_head(store, device)
    except DistillError as error:
        raise VerifyError(f"{error}, so masks can't be compared: --points 0 goes on without them") from error


def own_head(student: Path, image_size: int, device: torch.device) -> SamHead | None:
    """The head that was trained with a student, on `device`, frozen; None where it has the teacher's.

    `student` was read by `load_student`, which has checked it.
    """
    state = trained_head(student)
    return None if state is None else build_head(state, image_size).to(device)
