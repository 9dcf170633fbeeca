"""Images and their stored embeddings, decoded and read ahead by threads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ...common.errors import DistillError
from ...sam import DecodedImage, ImageError, load_image, place_on_canvas, read_checked, valid_cells
from ...store import EmbeddingStore, ImageRecord, StoredBatch
from .labels import Labels


@dataclass(frozen=True, kw_only=True)
class LabelledObjects:
    """Objects of B images, at most K of each, M the side of their masks over the encoder's square.

    masks_BKMM, known_BK: bool, the objects, and which of the places have one.
    annotated_B: bool, on the CPU and never pinned, which images have annotations at all.
    """

    masks_BKMM: Tensor
    known_BK: Tensor
    annotated_B: Tensor

    def to(self, device: torch.device) -> LabelledObjects:
        """The same with the masks on a device, without waiting where they are pinned."""
        return replace(
            self,
            masks_BKMM=self.masks_BKMM.to(device, non_blocking=True),
            known_BK=self.known_BK.to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of a store with their images, on the CPU (pinned where the loader was asked to).

    canvas_BHWC: uint8 RGB (B, S, S, 3), image in the top-left corner, zeros elsewhere.
    sizes_B2: int64 (B, 2), height and width of the image on its canvas.
    valid_BHW: bool (B, g, g), cells of the embedding whose centre is image.
    values_BCHW: (B, 256, g, g) in the store's dtype; scales_BC: float32 (B, 256) for int8, else None.
    objects: drawn from annotations; None where no labels are read.
    """

    rows: list[int]
    canvas_BHWC: Tensor
    sizes_B2: Tensor
    valid_BHW: Tensor
    values_BCHW: Tensor
    scales_BC: Tensor | None
    objects: LabelledObjects | None = None


class Loader:
    """Gives batches in the order asked for while its threads prepare the next ones.

    Threads, not processes: decoding, hashing and reading all release the interpreter's lock. At most
    `read_ahead` images, or one batch, are prepared beyond the one in use. `waited` is the time in seconds that
    the consumer spent waiting for data, over all batches so far. The first use of an image checks its SHA-256,
    every use its length. With None for `image_root` images come from the store, which has to keep them. With `labels`
    batches have objects, too, others in each `epoch`.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        records: Iterable[ImageRecord],
        image_root: Path | None,
        *,
        workers: int,
        pin_memory: bool = False,
        labels: Labels | None = None,
    ) -> None:
        self.epoch = 0
        self.labels = labels
        self._store = store
        self.records = {record.row: record for record in records}
        self._image_root = image_root
        self._image_size = store.spec.image_size
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
        """Ends the threads; what they had not begun is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def valid(self, rows: Sequence[int]) -> Tensor:
        """Cells whose centre is image, bool (B, g, g), from the manifest alone."""
        cells = [valid_cells(self._resized_size(row), self._image_size) for row in rows]
        return torch.stack([torch.from_numpy(cell) for cell in cells])

    def batches(self, row_lists: Iterable[Sequence[int]], *, with_masks: bool = False) -> Generator[Batch]:
        """One batch for each list of rows, in order; with objects for their masks where labels are read.

        Close the generator to drop what was read ahead. Raises ImageError naming an image that is missing or
        not the one the store knows, StoreDamaged naming a row, DistillError naming one that doesn't decode.
        """
        coming = iter(row_lists)
        labels = self.labels if with_masks else None
        begun: deque[tuple[Batch, list[Future[None]]]] = deque()
        try:
            self._top_up(begun, coming, labels)
            while begun:
                batch, futures = begun.popleft()
                # Before waiting: else threads would be idle while the last of them fills this batch.
                self._top_up(begun, coming, labels)
                start = time.perf_counter()
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    begun.append((batch, futures))  # so that the rest of this batch is cancelled too
                    raise
                self.waited += time.perf_counter() - start
                yield batch
        finally:
            for _, futures in begun:
                for future in futures:
                    future.cancel()

    def _top_up(
        self,
        begun: deque[tuple[Batch, list[Future[None]]]],
        coming: Iterator[Sequence[int]],
        labels: Labels | None,
    ) -> None:
        while not begun or sum(len(batch.rows) for batch, _ in begun) < self._read_ahead:
            rows = next(coming, None)
            if rows is None:
                return
            batch = self._empty(list(rows), labels)
            futures = [
                self._pool.submit(self._fill, batch, place, labels, self.epoch)
                for place in range(len(batch.rows))
            ]
            begun.append((batch, futures))

    def _empty(self, rows: list[int], labels: Labels | None) -> Batch:
        size, pin = self._image_size, self._pin_memory
        values_BCHW, scales_BC = self._empty_embeddings(len(rows))
        return Batch(
            rows=rows,
            canvas_BHWC=torch.empty(len(rows), size, size, 3, dtype=torch.uint8, pin_memory=pin),
            sizes_B2=torch.tensor([self._resized_size(row) for row in rows], pin_memory=pin),
            valid_BHW=self.valid(rows).pin_memory() if pin else self.valid(rows),
            values_BCHW=values_BCHW,
            scales_BC=scales_BC,
            objects=None if labels is None else self._no_objects(len(rows), labels),
        )

    def _no_objects(self, rows: int, labels: Labels) -> LabelledObjects:
        count, side, pin = labels.objects, labels.side, self._pin_memory
        return LabelledObjects(
            masks_BKMM=torch.zeros(rows, count, side, side, dtype=torch.bool, pin_memory=pin),
            known_BK=torch.zeros(rows, count, dtype=torch.bool, pin_memory=pin),
            annotated_B=torch.zeros(rows, dtype=torch.bool),
        )

    def _empty_embeddings(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """Values and scales to be read into: both pinned and other memory starts at a page here."""
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

    def _fill(self, batch: Batch, place: int, labels: Labels | None, epoch: int) -> None:
        """Decodes one image and reads one embedding into their place in the batch (runs in a thread)."""
        row = batch.rows[place]
        place_on_canvas(self._decode(self.records[row]), batch.canvas_BHWC[place].numpy())
        here = slice(place, place + 1)
        scales = None if batch.scales_BC is None else batch.scales_BC[here].numpy()
        self._store.read([row], StoredBatch(batch.values_BCHW[here].numpy(), scales))
        if labels is not None and batch.objects is not None:
            self._draw(labels, batch.objects, place, self.records[row], epoch)

    def _draw(
        self, labels: Labels, objects: LabelledObjects, place: int, record: ImageRecord, epoch: int
    ) -> None:
        masks = labels.draw(record, epoch)
        if masks is None:
            return
        objects.annotated_B[place] = True
        objects.known_BK[place, : len(masks)] = True
        objects.masks_BKMM[place, : len(masks)] = torch.from_numpy(masks)

    def _decode(self, record: ImageRecord) -> DecodedImage:
        data = self._read(record)
        try:
            image = load_image(data, self._image_size)
        except ImageError as error:
            raise DistillError(
                f"{record.key!r} decoded when it was precomputed but not now: {error}"
            ) from error
        if image.resized_size != record.resized_size:
            raise DistillError(
                f"{record.key!r} is now resized to {image.resized_size}, to {record.resized_size} when it was "
                "precomputed: another version of the image libraries? Precompute again"
            )
        return image

    def _read(self, record: ImageRecord) -> bytes:
        """The image's file: the one that was precomputed, or the one that the store kept of it."""
        if self._image_root is None:
            return self._store.read_image(record.row)
        assert record.bytes is not None, "only committed rows are loaded"
        sha256 = None if record.row in self._checked else record.sha256
        data = read_checked(self._image_root, record.key, record.offset, record.bytes, sha256)
        self._checked.add(record.row)
        return data
