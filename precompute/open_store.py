"""Open the planned store for writing: make it, or resume and extend it, with its teacher's weights."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import CheckpointError, PrecomputeError, StoreMismatch, counted
from ..sam import KEPT_KIND, preprocessing_recipe
from ..sam.registry import EMBEDDED_TEACHER, TEACHERS, TeacherPackage, find_teacher_package, is_teacher
from ..sam.teacher import (
    embedded_sha256,
    inspect_checkpoint,
    load_head,
    positions_interpolated,
    read_package_head,
)
from ..sam.teacher_package import package_sha256
from ..sam.weights.download import find_checkpoint
from ..sam.weights.weight_files import weights_sha256
from ..store import EmbeddingStore, StoreDamaged, StoreSpec, encode_head
from ..store.spec import package_versions
from .plan import ExistingStore, Plan
from .progress import Observer

_PACKAGES = (
    *("torch", "torchvision", "segment-anything", "zarr", "numpy"),
    *("pillow", "pillow-heif", "dask", "distributed"),
)
"""Packages on which an embedding's bits depend."""


@dataclass(frozen=True, kw_only=True)
class TeacherFile:
    """A teacher's name and weights."""

    name: str
    path: Path | None
    """None for the embedded teacher, and for another package's that was given no file."""
    sha256: str
    """SHA-256 of the checkpoint; of the package's weights for the embedded teacher; for another package's, as
    `package_sha256` returns it."""
    package: TeacherPackage | None = None
    """Package of the teacher; None for those of this package."""
    has_head: bool = True
    """False if the checkpoint is known to be an image encoder alone."""
    trained_image_size: int | None = None
    """Image size of the checkpoint's position tables, in pixels; None: that of the official checkpoint."""


def find_teacher(plan: Plan, observer: Observer, *, download: bool = True) -> TeacherFile:
    """Find the checkpoint of the plan's teacher, or download it, hash and check it.

    Args:
        plan: plan of the run.
        observer: receives the download's progress, and a note about what is taken of the checkpoint.
        download: if False, an absent checkpoint is an error.

    Returns:
        The teacher's name, file and hash.

    Raises:
        PrecomputeError: the store was made with an unofficial checkpoint, and none is given; raised before any
            download.
        CheckpointError: the checkpoint is absent, unusable, or another teacher's.
        DownloadError: it can't be downloaded.
        SamError: no installed package has the teacher, or two have one of this name.
        StoreMismatch: the store was made with another package's or another version of the teacher.
    """
    stored = plan.existing.spec if plan.existing else None
    if stored and stored.teacher_package is not None and not is_teacher(plan.teacher):
        made_by = TeacherPackage(**stored.teacher_package)
        raise StoreMismatch(
            f"{plan.config.out} was made with the teacher {stored.teacher} of {made_by}, which is not installed "
            "here: install it, or give another --out"
        )
    found = find_teacher_package(plan.teacher)
    package = None if found is None else found[0]
    if stored:
        _refuse_other_package(plan.config.out, stored, package)
    if package is not None:
        return _of_package(plan, stored, package)
    official = TEACHERS[plan.teacher].checkpoint
    known = None if official is None else official.sha256
    if stored and plan.config.checkpoint is None and known not in (None, stored.checkpoint_sha256):
        raise PrecomputeError(
            f"{plan.config.out} was made with {stored.checkpoint} (SHA-256 {stored.checkpoint_sha256[:16]}), which "
            f"is not the official {plan.teacher}: name it with --checkpoint"
        )
    path = find_checkpoint(
        plan.teacher, plan.config.checkpoint, progress=observer.download, download=download
    )
    if path is None:
        _refuse_other_embedded(plan.config.out, stored)
        return TeacherFile(name=plan.teacher, path=None, sha256=embedded_sha256())
    content = inspect_checkpoint(plan.teacher, path)
    if content.note is not None:
        observer.message(content.note)
    return TeacherFile(
        name=plan.teacher,
        path=path.absolute(),
        sha256=weights_sha256(path),
        has_head=content.has_head,
        trained_image_size=content.trained_image_size,
    )


def _refuse_other_embedded(out: Path, stored: StoreSpec | None) -> None:
    """Refuse to extend a store of other weights of the embedded teacher than this package's."""
    if stored is None or (stored.teacher, stored.checkpoint) != (EMBEDDED_TEACHER, None):
        return
    if stored.checkpoint_sha256 == embedded_sha256():
        return
    raise StoreMismatch(
        f"{out} was made with other weights of {stored.teacher} (SHA-256 {stored.checkpoint_sha256[:16]}) than this "
        f"package's ({embedded_sha256()[:16]}): it can be distilled from and verified, but for more images give "
        "another --out, or install the mobilesam that made it"
    )


def _refuse_other_package(out: Path, stored: StoreSpec, found: TeacherPackage | None) -> None:
    """Refuse to mix embeddings of two packages, or of two versions of one: nothing says that they are equal."""
    now = None if found is None else found.to_json()
    if stored.teacher_package == now:
        return
    made_by = (
        "this package" if stored.teacher_package is None else str(TeacherPackage(**stored.teacher_package))
    )
    raise StoreMismatch(
        f"{out} was made with the teacher {stored.teacher} of {made_by}, and here it is of {found or 'this package'}"
        f"{'' if found is None else f' ({found.entry_point})'}: install what it was made with, or give another --out"
    )


def _of_package(plan: Plan, stored: StoreSpec | None, package: TeacherPackage) -> TeacherFile:
    """Return another package's teacher with its checkpoint, if one is given."""
    path = plan.config.checkpoint
    if stored and path is None and stored.checkpoint is not None:
        raise PrecomputeError(
            f"{plan.config.out} was made with {stored.checkpoint} (SHA-256 {stored.checkpoint_sha256[:16]}): name it "
            "with --checkpoint"
        )
    if stored and path is not None and stored.checkpoint is None:
        raise CheckpointError(
            f"{plan.config.out} was made with {plan.teacher} ({package}) without a file: leave out --checkpoint"
        )
    sha256 = package_sha256(plan.teacher, package, path)
    return TeacherFile(
        name=plan.teacher, path=None if path is None else path.absolute(), sha256=sha256, package=package
    )


def open_store(plan: Plan, teacher: TeacherFile, observer: Observer) -> EmbeddingStore:
    """Make or extend the store as planned, and open it as its only writer.

    Args:
        plan: plan of the run.
        teacher: the plan's teacher, as `find_teacher` returns it.
        observer: receives messages about an extension or a repair.

    Returns:
        The store, open for writing.

    Raises:
        StoreMismatch: the store was made with another checkpoint or preprocessing.
        StoreError: it is locked or damaged, or can't be written.
        PrecomputeError: another process has extended it since the plan was made.
    """
    if plan.existing is None:
        head, head_sha256 = _head(teacher, plan)
        if head is None:
            whose = f"{teacher.name} of {teacher.package}" if teacher.package else f"{teacher.path}"
            observer.message(
                f"{whose} has no mask head: students learn its embeddings; for masks give --head with a file that "
                "has SAM's head"
            )
        spec = _new_spec(plan, teacher, head_sha256)
        return EmbeddingStore.create(plan.config.out, spec, plan.new_images, plan.selection, head)
    plan.existing.spec.refuse_differences(
        plan.config.out,
        {
            "checkpoint_sha256": teacher.sha256,
            "preprocessing": preprocessing_recipe(plan.image_size),
        },
    )
    store = EmbeddingStore.open(plan.config.out, writable=True)
    try:
        _update(store, plan.existing, plan, teacher, observer)
    except BaseException:
        store.close()
        raise
    return store


def _update(
    store: EmbeddingStore, existing: ExistingStore, plan: Plan, teacher: TeacherFile, observer: Observer
) -> None:
    """Repair the head, extend the store and withdraw shards as planned, and update the pending images' listing."""
    if store.manifest.row_count() != existing.rows:
        raise PrecomputeError(
            f"another process extended {plan.config.out} just now, from {existing.rows:,} to "
            f"{counted(store.manifest.row_count(), 'image')}: run the same command again"
        )
    _repair_head(store, plan, teacher, observer)
    if plan.new_images:
        store.extend(plan.new_images, plan.selection)
        observer.message(
            f"extended by {counted(len(plan.new_images), 'image')} to {store.manifest.row_count():,}"
        )
    if plan.config.retry_failed:
        store.withdraw(store.manifest.shards_with_failures())
    if store.pending_shards():
        store.relist(plan.listing.files)


def _repair_head(store: EmbeddingStore, plan: Plan, teacher: TeacherFile, observer: Observer) -> None:
    """Restore a damaged or missing copy of SAM's prompt encoder and mask decoder from the teacher's file."""
    if store.spec.head_sha256 is None:
        return
    try:
        store.read_head()
    except StoreDamaged as error:
        head, _ = _head(teacher, plan)
        if head is None:
            raise PrecomputeError(
                f"{error}\n{teacher.name} of {teacher.package} gives no head any more: its head_state() is gone"
            ) from error
        store.restore_head(head)
        observer.message(f"rewrote {store.head_path} from the teacher's file: {error}")


def _head(teacher: TeacherFile, plan: Plan) -> tuple[bytes, str] | tuple[None, None]:
    """Return the bytes and SHA-256 of the teacher's head; None if there is none: for an encoder alone, or another
    package's teacher without one. Another package's is also tried, so that a wrong one is refused before a store is
    made."""
    if not teacher.has_head:
        return None, None
    if teacher.package is None:
        tensors = load_head(teacher.name, teacher.path)
    else:
        # Like the workers of this machine; those of a cluster may have devices that this one lacks.
        device = "cpu" if plan.config.scheduler else plan.hardware.devices[0]
        found = read_package_head(teacher.name, teacher.path, plan.image_size, device)
        if found is None:
            return None, None
        tensors = found
    return encode_head({name: value.numpy() for name, value in tensors.items()})


def _new_spec(plan: Plan, teacher: TeacherFile, head_sha256: str | None) -> StoreSpec:
    return StoreSpec(
        store_id=uuid.uuid4().hex,
        teacher=teacher.name,
        checkpoint=None if teacher.path is None else teacher.path.name,
        checkpoint_sha256=teacher.sha256,
        head_sha256=head_sha256,
        image_size=plan.image_size,
        teacher_package=None if teacher.package is None else teacher.package.to_json(),
        positions_interpolated=teacher.package is None
        and positions_interpolated(teacher.name, plan.image_size, teacher.trained_image_size),
        preprocessing=preprocessing_recipe(plan.image_size),
        dtype=plan.dtype,
        precision=plan.hardware.precision,
        shard_size=plan.shard_size,
        kept_images=KEPT_KIND if plan.keeps_images else None,
        subset={"fraction": plan.selection.fraction, "seed": plan.selection.seed},
        image_root=str(plan.listing.root),
        versions=package_versions(_PACKAGES),
    )
