"""From a plan to a store that is open for writing: made, or extended, with the teacher that it belongs to."""

from __future__ import annotations

import platform
import uuid
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__
from ..common.errors import PrecomputeError
from ..sam import KEPT_KIND, preprocessing_recipe
from ..sam.download import file_sha256, find_checkpoint
from ..sam.registry import TEACHERS
from ..sam.teacher import embedded_sha256, load_head, positions_interpolated
from ..store import EmbeddingStore, StoreDamaged, StoreSpec, encode_head
from .plan import Plan, Stored
from .progress import Observer


@dataclass(frozen=True, kw_only=True)
class TeacherFile:
    """A teacher's name and weights: `path` is None for the embedded one."""

    name: str
    path: Path | None
    sha256: str


def find_teacher(plan: Plan, observer: Observer, *, download: bool = True) -> TeacherFile:
    """The plan's teacher, its checkpoint found (or downloaded) and hashed.

    PrecomputeError, before any download, when the store was made with a checkpoint that is not the official one and
    none is given.
    """
    stored, official = plan.stored and plan.stored.spec, TEACHERS[plan.teacher].checkpoint
    if stored and plan.config.checkpoint is None and official and official.sha256 != stored.checkpoint_sha256:
        raise PrecomputeError(
            f"{plan.config.out} was made with {stored.checkpoint} (SHA-256 {stored.checkpoint_sha256[:16]}), which "
            f"is not the official {plan.teacher}: name it with --checkpoint"
        )
    path = find_checkpoint(
        plan.teacher, plan.config.checkpoint, progress=observer.download, download=download
    )
    if path is None:
        return TeacherFile(name=plan.teacher, path=None, sha256=embedded_sha256())
    return TeacherFile(name=plan.teacher, path=path.absolute(), sha256=file_sha256(path))


def open_store(plan: Plan, teacher: TeacherFile, observer: Observer) -> EmbeddingStore:
    """Make or extend the store as planned, and open it as its only writer."""
    if plan.stored is None:
        head, head_sha256 = _head(teacher)
        spec = _new_spec(plan, teacher, head_sha256)
        return EmbeddingStore.create(plan.config.out, spec, plan.new, plan.selection, head)
    plan.stored.spec.refuse_differences(
        plan.config.out,
        {
            "checkpoint_sha256": teacher.sha256,
            "preprocessing": preprocessing_recipe(plan.image_size),
        },
    )
    store = EmbeddingStore.open(plan.config.out, writable=True)
    try:
        _go_on(store, plan.stored, plan, teacher, observer)
    except BaseException:
        store.close()
        raise
    return store


def _go_on(
    store: EmbeddingStore, stored: Stored, plan: Plan, teacher: TeacherFile, observer: Observer
) -> None:
    """Bring an open store to what is planned."""
    if store.manifest.row_count() != stored.rows:
        raise PrecomputeError(
            f"another process extended {plan.config.out} just now, from {stored.rows:,} to "
            f"{store.manifest.row_count():,} images: run the same command again"
        )
    _mend_head(store, teacher, observer)
    if plan.new:
        store.extend(plan.new, plan.selection)
        observer.message(f"extended by {len(plan.new):,} images to {store.manifest.row_count():,}")
    if plan.config.retry_failed:
        store.withdraw(store.manifest.shards_with_failures())
    if store.pending_shards():
        store.relist(plan.listing.files)


def _head(teacher: TeacherFile) -> tuple[bytes, str]:
    tensors = load_head(teacher.name, teacher.path)
    return encode_head({name: value.numpy() for name, value in tensors.items()})


def _mend_head(store: EmbeddingStore, teacher: TeacherFile, observer: Observer) -> None:
    """SAM's prompt encoder and mask decoder come from the teacher's file: a damaged copy is no loss."""
    try:
        store.read_head()
    except StoreDamaged as error:
        store.restore_head(_head(teacher)[0])
        observer.message(f"{store.head_path} is written anew from the teacher's file: {error}")


def _new_spec(plan: Plan, teacher: TeacherFile, head_sha256: str) -> StoreSpec:
    return StoreSpec(
        store_id=uuid.uuid4().hex,
        teacher=teacher.name,
        checkpoint=None if teacher.path is None else teacher.path.name,
        checkpoint_sha256=teacher.sha256,
        head_sha256=head_sha256,
        image_size=plan.image_size,
        positions_interpolated=positions_interpolated(teacher.name, plan.image_size),
        preprocessing=preprocessing_recipe(plan.image_size),
        dtype=plan.dtype,
        precision=plan.hardware.precision,
        shard_size=plan.shard_size,
        kept_images=KEPT_KIND if plan.keeps_images else None,
        subset={"fraction": plan.selection.fraction, "seed": plan.selection.seed},
        image_root=str(plan.listing.root),
        versions=versions(),
    )


# --- Which software wrote a store.

_PACKAGES = ("torch", "torchvision", "segment-anything", "zarr", "numpy", "pillow", "dask", "distributed")


def versions() -> dict[str, str]:
    """Versions of this package, Python, and what decides an embedding's bits."""
    found = {"mobilesam": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
