"""What a run will do: options, listing and store compared, and refused where they contradict, before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ..common.errors import PrecomputeError, shown
from ..sam import KEPT_KIND, ImageRef, ImageSet, in_fraction, list_images, refuse_keeping
from ..store import EmbeddingStore, Selection, StoreSpec, exists, refuse_taken, rows_of, shard_count
from . import sizing
from .config import DEFAULT_DTYPE, DEFAULT_IMAGE_SIZE, DEFAULT_TEACHER, PrecomputeConfig
from .progress import Observer


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Where the teacher will run: `devices` of `device_type` (cpu or cuda) for the `workers` by turns, `precision` as
    resolved; `macs_per_second` of one worker where a shard size has to be chosen by it, else None."""

    devices: tuple[str, ...]
    device_type: str
    workers: int
    precision: str
    macs_per_second: float | None


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What there is already: the store's spec, its number of rows, how many each committed shard has, and in which of
    them images failed."""

    spec: StoreSpec
    rows: int
    committed: Mapping[int, int]
    with_failures: tuple[int, ...]


def look_up(path: Path) -> Stored | None:
    """What the store at `path` holds; None when there is none, and one can be made there."""
    if not exists(path):
        refuse_taken(path)
        return None
    with EmbeddingStore.open(path) as store:
        return Stored(
            spec=store.spec,
            rows=store.manifest.row_count(),
            committed=store.manifest.committed_shards(),
            with_failures=tuple(store.manifest.shards_with_failures()),
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The store that will be made or gone on with (`stored` is None for a new one), and `new`, the images that
    will be given rows in it."""

    config: PrecomputeConfig
    stored: Stored | None
    hardware: Hardware
    listing: ImageSet
    selection: Selection
    new: tuple[ImageRef, ...]
    teacher: str
    image_size: int
    dtype: str
    shard_size: int

    @property
    def keeps_images(self) -> bool:
        """Whether the store keeps resized images."""
        return self.config.keep_images if self.stored is None else self.stored.spec.kept_images is not None

    @property
    def rows(self) -> int:
        """Rows that the store will have."""
        return len(self.new) + (self.stored.rows if self.stored else 0)

    @property
    def shards(self) -> int:
        """Shards that the store will have."""
        return shard_count(self.rows, self.shard_size)

    @property
    def pending(self) -> dict[int, int]:
        """The shards to compute, with their numbers of rows."""
        whole = {shard: len(rows_of(shard, self.shard_size, self.rows)) for shard in range(self.shards)}
        if self.stored is None:
            return whole
        again = self.stored.with_failures if self.config.retry_failed else ()
        return {
            shard: rows
            for shard, rows in whole.items()
            if self.stored.committed.get(shard) != rows or shard in again
        }


def refuse_contradictions(config: PrecomputeConfig, spec: StoreSpec) -> None:
    """Refuse explicit settings that differ from the store's."""
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


def make_plan(
    config: PrecomputeConfig, stored: Stored | None, hardware: Hardware, observer: Observer
) -> Plan:
    """List the images and choose among them; change nothing."""
    listing = list_images(config.images, root=_root(config, stored))
    for problem in listing.problems:
        observer.message(f"passed over: {problem}")
    selection = Selection(
        fraction=config.fraction,
        seed=config.seed,
        limit=config.limit,
        sources=tuple(str(path.absolute()) for path in config.images),
        checkpoint=None if config.checkpoint is None else str(config.checkpoint.absolute()),
    )
    if stored:
        spec = stored.spec
        with EmbeddingStore.open(config.out) as store:
            new = select_more(listing.files, selection, store.manifest.sorted_keys())
        _refuse_unasked_growth(config, new, stored.rows)
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
        stored=stored,
        hardware=hardware,
        listing=listing,
        selection=selection,
        new=tuple(new),
        teacher=teacher,
        image_size=image_size,
        dtype=dtype,
        shard_size=shard_size,
    )


def _root(config: PrecomputeConfig, stored: Stored | None) -> Path | None:
    """The store's own image root when the images given lie below it, so that keys stay what they were when only a
    part of the first folders, or more of them, is named."""
    if stored is None:
        return None
    root = Path(stored.spec.image_root)
    return root if all(path.absolute().is_relative_to(root) for path in config.images) else None


def _shard_size(teacher: str, image_size: int, hardware: Hardware, images: int) -> int:
    assert hardware.macs_per_second is not None
    seconds = sizing.estimated_seconds(teacher, image_size, hardware.macs_per_second)
    return sizing.shard_size(images, hardware.workers, seconds)


def _refuse_unasked_growth(config: PrecomputeConfig, new: Sequence[ImageRef], rows: int) -> None:
    if new and not config.extend:
        raise PrecomputeError(
            f"{len(new):,} images are not in the store of {rows:,} yet, the first: {shown(new[0].key)}; "
            "append them with --extend, or ask for fewer with --fraction or --limit"
        )


# --- Which of the listed images a store gets: pure, given the listing and what the store has.

_END: tuple[bytes, ImageRef | None] = (b"", None)


def select(files: Sequence[ImageRef], selection: Selection) -> list[ImageRef]:
    """The images of a new store: those that the fraction keeps, in the order given, up to the limit."""
    kept = [file for file in files if _keeps(selection, file)]
    if not kept:
        raise PrecomputeError(
            f"--fraction {selection.fraction:g} keeps none of {len(files):,} images: raise it"
        )
    return kept[: selection.limit]


def select_more(files: Iterable[ImageRef], selection: Selection, stored: Iterable[bytes]) -> list[ImageRef]:
    """The images to append to a store that has those with the keys `stored`. Both are sorted by the bytes of the key,
    and gone through once, side by side: a store's keys are never all in memory.

    Raises PrecomputeError when the selection is not a superset of what is stored: a row is never dropped.
    """
    new: list[ImageRef] = []
    rows = gone = dropped = 0
    first_gone: bytes | None = None
    listed = ((os.fsencode(file.key), file) for file in files)
    name, file = next(listed, _END)
    for key in stored:
        rows += 1
        while file is not None and name < key:
            if _keeps(selection, file):
                new.append(file)
            name, file = next(listed, _END)
        if file is None or name != key:
            gone += 1
            first_gone = first_gone or key
            continue
        dropped += not _keeps(selection, file)
        name, file = next(listed, _END)
    if file is not None:
        rest = chain([file], (later for _, later in listed))
        new += [later for later in rest if _keeps(selection, later)]
    _refuse_fewer(selection, rows, gone, first_gone, dropped)
    return new if selection.limit is None else new[: selection.limit - rows]


def _keeps(selection: Selection, file: ImageRef) -> bool:
    return in_fraction(file.key, selection.fraction, selection.seed)


def _refuse_fewer(selection: Selection, rows: int, gone: int, first_gone: bytes | None, dropped: int) -> None:
    if first_gone is not None:
        raise PrecomputeError(
            f"{gone:,} of the store's {rows:,} images are gone from the folder, the first: "
            f"{shown(os.fsdecode(first_gone))}; put them back, or give another --out"
        )
    if dropped:
        raise PrecomputeError(
            f"--fraction {selection.fraction:g} --seed {selection.seed} leaves out {dropped:,} of the "
            f"store's {rows:,} images: ask for what the store was made with or more, or give another --out"
        )
    if selection.limit is not None and selection.limit < rows:
        raise PrecomputeError(
            f"--limit {selection.limit:,} is fewer than the {rows:,} images in the store: raise it, "
            "or give another --out"
        )
