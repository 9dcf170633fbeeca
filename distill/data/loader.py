"""Loader: batches of images with their stored embeddings, decoded and read ahead by threads; the images' folder.

Shape suffixes: B images, C channels, H and W rows and columns of the image's canvas or of the embedding's grid
(g x g), S side of the encoder's square, Q objects drawn of one image, M side of the masks compared,
2 (height, width).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ...common.errors import DistillError, MobileSamError, shown
from ...sam import (
    DecodedImage,
    ImageError,
    load_image,
    place_on_canvas,
    preprocessing_recipe,
    read_checked,
    resized_size,
    valid_cells,
)
from ...sam.photos.file_kinds import is_store
from ...sam.photos.image_files import read_image, resolved_folder
from ...sam.photos.preprocess import TOO_THIN
from ...sam.photos.tar_files import path_of
from ...store import EmbeddingStore, ImageRecord, StoredBatch
from .labels import AnnotationLabels


@dataclass(frozen=True, kw_only=True)
class AnnotatedObjects:
    """Objects of B images from annotations, at most Q of each."""

    masks_BQMM: Tensor
    """bool (B, Q, M, M), masks over the encoder's square."""
    known_BQ: Tensor
    """bool (B, Q), True for places that hold an object."""
    annotated_B: Tensor
    """bool (B,), True for images with an annotation file; on the CPU and never pinned."""

    def to(self, device: torch.device) -> AnnotatedObjects:
        """Return a copy with masks and `known_BQ` on a device; copies from pinned memory are asynchronous."""
        return replace(
            self,
            masks_BQMM=self.masks_BQMM.to(device, non_blocking=True),
            known_BQ=self.known_BQ.to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of a store with their images, on the CPU (in pinned memory if the loader has `pin_memory`)."""

    rows: list[int]
    """Row numbers of the B images."""
    canvas_BHWC: Tensor
    """uint8 RGB, the student's input: square, image in the top-left corner, zeros elsewhere."""
    canvas_sizes_B2: Tensor
    """int64 (B, 2), height and width in pixels of the image on its canvas."""
    sizes_B2: Tensor
    """int64 (B, 2), height and width in pixels of the image on SAM's square, of which the canvas may be a smaller
    one."""
    valid_BHW: Tensor
    """bool (B, g, g), True for cells of the embedding whose centre lies in the image."""
    values_BCHW: Tensor
    """Stored embeddings, (B, 256, g, g) in the store's dtype."""
    scales_BC: Tensor | None
    """float32 (B, 256), factors of the values of an int8 store; else None."""
    objects: AnnotatedObjects | None = None
    """Objects drawn from annotations; None where no labels are read."""


class Loader:
    """Loader of batches in a given order; threads prepare the next batches ahead.

    Threads, not processes: decoding, hashing and reading all release the interpreter's lock. At most two images per
    thread, or one batch, are prepared beyond the batch in use. An image's SHA-256 is checked on first use, its length
    on every use.

    Args:
        store: store open for reading.
        records: records by row, of all rows that will be loaded.
        image_root: folder of the images; None: the images that the store keeps.
        workers: number of threads.
        pin_memory: put batches into pinned memory, for asynchronous copies to a GPU.
        labels: source of annotated objects, for batches with masks; None: no annotations.
        student_size: side of the canvas in pixels; None: the store's image size. Everything else of a batch has the
            frame of SAM's square, whatever the student sees.

    Attributes:
        records: records by row.
        epoch: number of the epoch, from 0, for which objects are drawn; set it before `batches`.
        waited: seconds that the consumer has waited for data so far.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        records: Mapping[int, ImageRecord],
        image_root: Path | None,
        *,
        workers: int,
        pin_memory: bool = False,
        labels: AnnotationLabels | None = None,
        student_size: int | None = None,
    ) -> None:
        self.epoch = 0
        self.labels = labels
        self._store = store
        self.records = records
        self._image_root = image_root
        self._image_size = store.spec.image_size
        self._student_size = student_size or store.spec.image_size
        self._grid = store.spec.grid
        self._pin_memory = pin_memory
        self._read_ahead = 2 * workers
        self._checked: set[int] = set()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        self.waited = 0.0

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and cancel the images not yet begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def valid(self, rows: Sequence[int]) -> Tensor:
        """Return the valid cells of some rows from the manifest alone, without reading images.

        Args:
            rows: row numbers of the B images.

        Returns:
            bool (B, g, g), True for cells whose centre lies in the image.
        """
        cells = [valid_cells(self._resized_size(row), self._image_size) for row in rows]
        return torch.stack([torch.from_numpy(cell) for cell in cells])

    def batches(self, row_lists: Iterable[Sequence[int]], *, with_masks: bool = False) -> Generator[Batch]:
        """Yield one batch for each list of rows, in order. Close the generator to drop the batches read ahead.

        Args:
            row_lists: rows of each batch.
            with_masks: add objects from annotations, if the loader has labels.

        Raises:
            ImageError: an image is missing or differs from the precomputed one; the message names it.
            StoreDamaged: a row's embedding or kept image is damaged.
            DistillError: an image doesn't decode as it did in precompute; the message names it.
        """
        coming = iter(row_lists)
        labels = self.labels if with_masks else None
        pending: deque[tuple[Batch, list[Future[None]]]] = deque()
        try:
            self._top_up(pending, coming, labels)
            while pending:
                batch, futures = pending.popleft()
                # Before waiting: otherwise threads would be idle while the last one finishes this batch.
                self._top_up(pending, coming, labels)
                start = time.perf_counter()
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    pending.append((batch, futures))  # the rest of this batch is cancelled too
                    raise
                self.waited += time.perf_counter() - start
                yield batch
        finally:
            for _, futures in pending:
                for future in futures:
                    future.cancel()

    def _top_up(
        self,
        pending: deque[tuple[Batch, list[Future[None]]]],
        coming: Iterator[Sequence[int]],
        labels: AnnotationLabels | None,
    ) -> None:
        while not pending or sum(len(batch.rows) for batch, _ in pending) < self._read_ahead:
            rows = next(coming, None)
            if rows is None:
                return
            batch = self._empty(list(rows), labels)
            futures = [
                self._pool.submit(self._fill, batch, place, labels, self.epoch)
                for place in range(len(batch.rows))
            ]
            pending.append((batch, futures))

    def _empty(self, rows: list[int], labels: AnnotationLabels | None) -> Batch:
        size, pin = self._student_size, self._pin_memory
        values_BCHW, scales_BC = self._empty_embeddings(len(rows))
        return Batch(
            rows=rows,
            canvas_BHWC=torch.empty(len(rows), size, size, 3, dtype=torch.uint8, pin_memory=pin),
            canvas_sizes_B2=torch.empty(len(rows), 2, dtype=torch.int64, pin_memory=pin),
            sizes_B2=torch.tensor([self._resized_size(row) for row in rows], pin_memory=pin),
            valid_BHW=self.valid(rows).pin_memory() if pin else self.valid(rows),
            values_BCHW=values_BCHW,
            scales_BC=scales_BC,
            objects=None if labels is None else self._no_objects(len(rows), labels),
        )

    def _no_objects(self, rows: int, labels: AnnotationLabels) -> AnnotatedObjects:
        count, side, pin = labels.objects, labels.side, self._pin_memory
        return AnnotatedObjects(
            masks_BQMM=torch.zeros(rows, count, side, side, dtype=torch.bool, pin_memory=pin),
            known_BQ=torch.zeros(rows, count, dtype=torch.bool, pin_memory=pin),
            annotated_B=torch.zeros(rows, dtype=torch.bool),
        )

    def _empty_embeddings(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """Return uninitialised values and scales to read into; pinned or not, they are page-aligned."""
        if not self._pin_memory:
            stored = self._store.reader.empty_batch(rows)
            scales_BC = None if stored.scales is None else torch.from_numpy(stored.scales)
            return torch.from_numpy(stored.values), scales_BC
        dtype = self._store.spec.dtype
        shape = (rows, 256, self._grid, self._grid)
        values_BCHW = torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=True)
        return values_BCHW, torch.empty(rows, 256, pin_memory=True) if dtype == "int8" else None

    def _resized_size(self, row: int) -> tuple[int, int]:
        resized_size = self.records[row].resized_size
        assert resized_size is not None, "only committed rows are loaded"
        return resized_size

    def _fill(self, batch: Batch, place: int, labels: AnnotationLabels | None, epoch: int) -> None:
        """Decode one image and read one embedding into their place in the batch (runs in a thread)."""
        row = batch.rows[place]
        image = self._decode(self.records[row])
        place_on_canvas(image, batch.canvas_BHWC[place].numpy())
        batch.canvas_sizes_B2[place] = torch.tensor(image.resized_size)
        here = slice(place, place + 1)
        scales = None if batch.scales_BC is None else batch.scales_BC[here].numpy()
        self._store.read([row], StoredBatch(batch.values_BCHW[here].numpy(), scales))
        if labels is not None and batch.objects is not None:
            self._draw(labels, batch.objects, place, self.records[row], epoch)

    def _draw(
        self, labels: AnnotationLabels, objects: AnnotatedObjects, place: int, record: ImageRecord, epoch: int
    ) -> None:
        masks = labels.draw(record, epoch)
        if masks is None:
            return
        objects.annotated_B[place] = True
        objects.known_BQ[place, : len(masks)] = True
        objects.masks_BQMM[place, : len(masks)] = torch.from_numpy(masks)

    def _decode(self, record: ImageRecord) -> DecodedImage:
        data = self._read(record)
        try:
            image = load_image(data, self._student_size)
            found = resized_size(*image.original_size, self._image_size)
        except ImageError as error:
            if self._student_size < self._image_size and str(error).startswith(TOO_THIN):
                raise DistillError(f"{record.key!r} is {error}: give a larger --student-size") from error
            raise DistillError(
                f"{record.key!r} decoded when it was precomputed but not now: {error}"
            ) from error
        if found != record.resized_size:
            raise DistillError(
                f"{record.key!r} is now resized to {found}, to {record.resized_size} when it was "
                "precomputed: another version of the image libraries? Precompute again"
            )
        return image

    def _read(self, record: ImageRecord) -> bytes:
        """Return the bytes of the image's file, from its folder or from the store."""
        if self._image_root is None:
            return self._store.read_image(record.row)
        assert record.bytes is not None, "only committed rows are loaded"
        sha256 = None if record.row in self._checked else record.sha256
        data = read_checked(self._image_root, record.key, record.offset, record.bytes, sha256)
        self._checked.add(record.row)
        return data


def default_workers(device: torch.device) -> int:
    """Return the default number of decoding threads: few on a CPU, where training is slower than decoding."""
    available = len(os.sched_getaffinity(0))
    return min(2 if device.type == "cpu" else 16, available)


def check_preprocessing(store: EmbeddingStore, *, refusal: type[MobileSamError] = DistillError) -> None:
    """Refuse a store that was made with another preprocessing than this version's.

    Args:
        store: store open for reading.
        refusal: exception class to raise.

    Raises:
        refusal: the store's preprocessing recipe is not this version's.
    """
    if dict(store.spec.preprocessing) != preprocessing_recipe(store.spec.image_size):
        raise refusal(
            f"{store.path} was made with another preprocessing than this version's: precompute it again"
        )


def find_image_root(
    store: EmbeddingStore,
    asked: Path | None,
    last: Path | None = None,
    *,
    refusal: type[MobileSamError] = DistillError,
    option: str = "--images",
) -> Path | None:
    """Find the folder of a store's images.

    Args:
        store: store; its spec names the folder that it was made from.
        asked: folder given by the user; takes precedence over all others, kept images included.
        last: folder in which the images were last used, if known; takes precedence over the store's folder.
        refusal: exception class for a folder that doesn't exist or holds other images.
        option: option that `asked` came from.

    Returns:
        The absolute path; None if the images that the store keeps are to be used.

    Raises:
        refusal: there is no such folder, or the store's first image isn't in the one that the user gave, or its first
            one of another folder isn't beside it.
    """
    if asked is None and store.spec.kept_images is not None:
        return None
    root = resolved_folder(asked or last or Path(store.spec.image_root))
    if asked is not None and (not root.is_dir() or is_store(str(root))):
        what = "a store, no folder of photos" if root.is_dir() else "no such folder"
        raise refusal(f"{option} {asked}: {what}; give the folder that holds the images of {store.path}")
    if not root.is_dir():
        raise refusal(f"the images of {store.path} are not at {root}; say where they are with {option} DIR")
    if asked is not None:
        _check_first_images(store, root, f"{option} {asked}", refusal)
    return root


def _check_first_images(store: EmbeddingStore, root: Path, given: str, refusal: type[MobileSamError]) -> None:
    """Refuse a folder in which the first image of the store can't be read, or beside which the first one that was
    listed beside the store's folder can't."""
    first = store.manifest.records("done", range(store.spec.shard_size))[:1]
    for record in first:
        if (error := _reading_error(root, record)) is not None:
            raise refusal(
                f"{given} doesn't hold the images of {store.path}: {shown(record.key)}: {error};\n"
                "give the folder that precompute read, or a copy of it"
            )
    key = next((key for key in store.manifest.sorted_keys() if key >= b"../"), b"")
    beside = store.manifest.find(os.fsdecode(key)) if key.startswith(b"../") else None
    if beside is not None and (error := _reading_error(root, beside)) is not None:
        listed = path_of(store.spec.image_root, beside.key)
        raise refusal(
            f"{shown(listed)} is looked for at {shown(path_of(root, beside.key))}, beside {given}: {error};\n"
            "the store's folders have to lie beside one another as they did: move this one too, or link it there"
        )


def _reading_error(root: Path, record: ImageRecord) -> ImageError | None:
    """Return the error of reading an image; None if it can be read."""
    try:
        read_image(
            root, record.key, offset=record.offset, size=None if record.offset is None else record.bytes
        )
    except ImageError as error:
        return error
    return None
