"""Plan of a run: options, images, store and hardware together; contradictions are refused before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from ..common.errors import PrecomputeError, counted, shown
from ..common.image_ref import ImageRef
from ..sam import (
    KEPT_KIND,
    ImageSet,
    in_fraction,
    refuse_keeping,
)
from ..sam.device import resolve_precision
from ..sam.photos.file_kinds import store_around
from ..store import (
    EmbeddingStore,
    Selection,
    StoreSpec,
    exists,
    refuse_taken,
    rows_of,
    shard_count,
)
from . import sizing
from .cluster import Cluster, connect, local_devices
from .config import DEFAULT_DTYPE, DEFAULT_IMAGE_SIZE, DEFAULT_TEACHER, PrecomputeConfig
from .listing import Absent, list_planned, refuse_absent, source_path
from .progress import Observer, begin_phase


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Hardware that the teacher will run on."""

    devices: tuple[str, ...]
    """Devices that the workers take in turn."""
    device_type: str
    """cpu or cuda."""
    workers: int
    """Number of worker processes."""
    precision: str
    """float32 or bfloat16, never auto."""
    macs_per_second: float | None
    """Multiply-accumulates per second of one worker; None if the shard size is already given."""


@dataclass(frozen=True, kw_only=True)
class ExistingStore:
    """Contents of the store that a run resumes or extends."""

    spec: StoreSpec
    rows: int
    """Rows of any status."""
    committed: Mapping[int, int]
    """Number of rows of each committed shard."""
    shards_with_failures: tuple[int, ...]
    """Committed shards in which at least one image failed, ascending."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Decisions made before a run begins."""

    config: PrecomputeConfig
    existing: ExistingStore | None
    """None if a new store will be made."""
    hardware: Hardware
    listing: ImageSet
    """All images found in the sources."""
    selection: Selection
    """Rule that chooses among them."""
    new_images: tuple[ImageRef, ...]
    """Images to append to the store, one for each new row."""
    teacher: str
    """Name of the teacher."""
    image_size: int
    """Side of the teacher's square input, in pixels."""
    dtype: str
    """Type of the stored embeddings."""
    shard_size: int
    """Rows of a full shard."""

    @property
    def keeps_images(self) -> bool:
        """True if the store keeps resized images."""
        if self.existing is None:
            return self.config.keep_images
        return self.existing.spec.kept_images is not None

    @property
    def rows(self) -> int:
        """Number of rows that the store will have."""
        return len(self.new_images) + (self.existing.rows if self.existing else 0)

    @property
    def shards(self) -> int:
        """Number of shards that the store will have."""
        return shard_count(self.rows, self.shard_size)

    @property
    def pending(self) -> dict[int, int]:
        """Number of rows of each shard to compute, by shard."""
        every = {shard: len(rows_of(shard, self.shard_size, self.rows)) for shard in range(self.shards)}
        if self.existing is None:
            return every
        again = self.existing.shards_with_failures if self.config.retry_failed else ()
        return {
            shard: rows
            for shard, rows in every.items()
            if self.existing.committed.get(shard) != rows or shard in again
        }


def plan_run(config: PrecomputeConfig, stack: ExitStack, observer: Observer) -> tuple[Plan, Cluster | None]:
    """Plan a run without changing anything.

    Args:
        config: options of the run.
        stack: keeps the cluster at `--scheduler` connected, if one is given.
        observer: receives a message for each file that can't be listed.

    Returns:
        The plan; the connected cluster at `--scheduler`, None without one.

    Raises:
        StoreError: the path holds something else than a store.
        StoreMismatch: options contradict the store.
        SamError: the images can't be listed.
        PrecomputeError: the path is inside another store, no cluster answers at `--scheduler`, or the selected images
            don't match the store's.
    """
    existing = read_existing(config.out)
    if existing:
        refuse_contradictions(config, existing.spec)
    cluster = None
    if config.scheduler:
        begin_phase(observer, "waiting for the scheduler and a worker")
        cluster = stack.enter_context(connect(config))
    begin_phase(observer, "listing the images")
    return make_plan(config, existing, detect_hardware(config, existing, cluster), observer), cluster


def read_existing(path: Path) -> ExistingStore | None:
    """Read the facts that a plan needs from the store at `path`; return None if a store can be made there.

    Raises:
        StoreError: the path holds something else than a store.
        PrecomputeError: it is inside another store.
    """
    if not exists(path):
        refuse_taken(path)
        around = store_around(os.path.abspath(path))
        if around is not None:
            raise PrecomputeError(
                f"--out {shown(str(path))} is inside the store {shown(around)}: give a path outside"
            )
        return None
    with EmbeddingStore.open(path) as store:
        return ExistingStore(
            spec=store.spec,
            rows=store.manifest.row_count(),
            committed=store.manifest.committed_shards(),
            shards_with_failures=tuple(store.manifest.shards_with_failures()),
        )


def refuse_contradictions(config: PrecomputeConfig, spec: StoreSpec) -> None:
    """Refuse options that contradict an existing store.

    Args:
        config: options of the run; those that are None, and precision "auto", fit any store.
        spec: description of the store.

    Raises:
        StoreMismatch: an option differs from the store's setting.
    """
    spec.refuse_differences(
        config.out,
        {
            "teacher": config.teacher,
            "image_size": config.image_size,
            "dtype": config.dtype,
            "precision": None if config.precision == "auto" else config.precision,
            "shard_size": config.shard_size,
            "kept_images": KEPT_KIND if config.keep_images else None,
        },
    )


def detect_hardware(
    config: PrecomputeConfig, existing: ExistingStore | None, cluster: Cluster | None
) -> Hardware:
    """Detect devices, workers and precision of this machine, or of an existing cluster's workers.

    Precision `auto` means that of the existing store, else bfloat16 if the hardware of every worker accelerates it.

    Args:
        config: options of the run.
        existing: contents of the store, if there is one.
        cluster: connected cluster at `--scheduler`, if one is given.

    Raises:
        PrecomputeError: a worker lacks mobilesam, or has another version.
        SamError: the device named is not there.
    """
    asked = existing.spec.precision if existing else config.precision
    measure = existing is None and config.shard_size is None
    if cluster is not None:
        types, precisions = zip(*cluster.describe_workers(asked), strict=True)
        precision = "float32" if "float32" in precisions else "bfloat16"
        return Hardware(
            devices=cluster.devices,
            device_type="cpu" if "cpu" in types else "cuda",
            workers=cluster.workers,
            precision=precision,
            macs_per_second=cluster.measure_worker(precision) if measure else None,
        )
    devices = local_devices(config)
    device = torch.device(devices[0])
    workers = config.workers or len(devices)
    precision = resolve_precision(asked, device)
    sharing = workers if device.type == "cpu" else 1
    return Hardware(
        devices=devices,
        device_type=device.type,
        workers=workers,
        precision=precision,
        macs_per_second=sizing.measure_macs_per_second(device, precision) / sharing if measure else None,
    )


def make_plan(
    config: PrecomputeConfig, existing: ExistingStore | None, hardware: Hardware, observer: Observer
) -> Plan:
    """List the images, choose among them, and settle the store's parameters.

    Args:
        config: options of the run.
        existing: contents of the store, if there is one; its parameters win over the defaults.
        hardware: hardware that the teacher will run on.
        observer: receives a message for each file that can't be listed.

    Raises:
        SamError: the images can't be listed.
        PrecomputeError: the selected images don't match the store's, or there are none.
    """
    listing = list_planned(config, existing.spec if existing else None, observer)
    selection = Selection(
        fraction=config.fraction,
        seed=config.seed,
        limit=config.limit,
        sources=tuple(source_path(path) for path in config.images),
        checkpoint=None if config.checkpoint is None else str(config.checkpoint.absolute()),
    )
    if existing:
        spec = existing.spec
        absent = Absent()
        with EmbeddingStore.open(config.out) as store:
            new = select_additional(listing.files, selection, store.manifest.sorted_keys(), absent)
        refuse_absent(config, absent, spec, listing.root, observer)
        _refuse_unasked_growth(config, new, existing.rows)
        teacher, image_size, dtype, shard_size = spec.teacher, spec.image_size, spec.dtype, spec.shard_size
    else:
        new = select(listing.files, selection)
        teacher = config.teacher or DEFAULT_TEACHER
        image_size = config.image_size or DEFAULT_IMAGE_SIZE
        if config.keep_images:
            refuse_keeping(image_size)
        dtype = config.dtype or DEFAULT_DTYPE
        shard_size = config.shard_size or _shard_size(teacher, image_size, hardware, len(new))
    return Plan(
        config=config,
        existing=existing,
        hardware=hardware,
        listing=listing,
        selection=selection,
        new_images=tuple(new),
        teacher=teacher,
        image_size=image_size,
        dtype=dtype,
        shard_size=shard_size,
    )


def _shard_size(teacher: str, image_size: int, hardware: Hardware, images: int) -> int:
    assert hardware.macs_per_second is not None
    seconds = sizing.estimated_seconds(teacher, image_size, hardware.macs_per_second)
    return sizing.shard_size(images, hardware.workers, seconds, hardware.device_type)


def _refuse_unasked_growth(config: PrecomputeConfig, new: Sequence[ImageRef], rows: int) -> None:
    if new and not config.extend:
        raise PrecomputeError(
            f"{counted(len(new), 'image')} {'is' if len(new) == 1 else 'are'} not in the store of "
            f"{rows:,} yet, the first: {shown(new[0].key)}; "
            "append them with --extend, or ask for fewer with --fraction or --limit"
        )


def select(files: Sequence[ImageRef], selection: Selection) -> list[ImageRef]:
    """Select the images of a new store.

    Args:
        files: listed images.
        selection: rule to apply.

    Returns:
        The images that the fraction keeps, in the order given, up to the limit.

    Raises:
        PrecomputeError: the fraction keeps no image.
    """
    kept = [file for file in files if _keeps(selection, file)]
    if not kept:
        raise PrecomputeError(
            f"--fraction {selection.fraction:g} keeps none of {counted(len(files), 'image')}: raise it"
        )
    return kept[: selection.limit]


def select_additional(
    files: Iterable[ImageRef], selection: Selection, stored: Iterable[bytes], absent: Absent | None = None
) -> list[ImageRef]:
    """Select the images to append to a store.

    Both iterables are merged in one pass, so that a store's keys are never all in memory.

    Args:
        files: listed images, sorted by the bytes of their keys.
        selection: rule to apply; its limit counts the store's images, too.
        stored: keys of the store's images as bytes, sorted.
        absent: counts the store's images that the listing lacks.

    Returns:
        The selected images that the store lacks, in the order given.

    Raises:
        PrecomputeError: the selection lacks listed images of the store; a row is never dropped.
    """
    new: list[ImageRef] = []
    rows = dropped = 0
    absent = absent or Absent()
    listed = ((os.fsencode(file.key), file) for file in files)
    end: tuple[bytes, ImageRef | None] = (b"", None)
    name, file = next(listed, end)
    for key in stored:
        rows += 1
        while file is not None and name < key:
            if _keeps(selection, file):
                new.append(file)
            name, file = next(listed, end)
        if file is None or name != key:
            absent.count += 1
            absent.first = absent.first or key
            continue
        dropped += not _keeps(selection, file)
        name, file = next(listed, end)
    if file is not None:
        rest = chain([file], (later for _, later in listed))
        new += [later for later in rest if _keeps(selection, later)]
    absent.rows = rows
    _refuse_fewer(selection, rows, dropped)
    return new if selection.limit is None else new[: selection.limit - rows]


def _keeps(selection: Selection, file: ImageRef) -> bool:
    return in_fraction(file.key, selection.fraction, selection.seed)


def _refuse_fewer(selection: Selection, rows: int, dropped: int) -> None:
    if dropped:
        raise PrecomputeError(
            f"--fraction {selection.fraction:g} --seed {selection.seed} leaves out {dropped:,} of the "
            f"store's {counted(rows, 'image')}: ask for what the store was made with or more, or give another --out"
        )
    if selection.limit is not None and selection.limit < rows:
        raise PrecomputeError(
            f"--limit {selection.limit:,} is fewer than the {counted(rows, 'image')} in the store: raise it, "
            "or give another --out"
        )
