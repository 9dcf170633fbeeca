"""Speed of distill's loader alone, in images a second by number of threads, and its cost on one core.

    python -m benchmarks.loader

loads generated photos of 1500 x 2250 pixels with random embeddings, at 1024 pixels, through distill's loader, whose
batches are dropped; and, in turn with it, through a bare pool of as many threads that decodes and reads the same rows
in the same order without assembling batches. The ratio shows what the loader adds to its parts. All files are in the
system's cache, and the process keeps freed memory, as distill does on a CPU.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import local
from typing import Any

import click
import numpy as np

from benchmarks.support.figures import Figure, by_turns, report
from benchmarks.support.pictures import make_large_photos
from benchmarks.support.synthetic_store import make_photo_store
from mobilesam.distill import Loader
from mobilesam.distill.data.rows import RecordsByRow
from mobilesam.distill.data.sampler import epoch_order, split_batches
from mobilesam.sam import DecodedImage, load_image, place_on_canvas
from mobilesam.sam.allocator import keep_freed_memory
from mobilesam.store import EmbeddingStore

TARGET = 0.95
STEP_RATES = (200, 850)
"""Plausible images a second of a student's step on an H100 (computed, FACTS.md)."""

STORES: Mapping[str, Mapping[str, Any]] = {
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "int8"},
    "int8, kept images": {"dtype": "int8", "keep_images": True},
}
"""Name of each measured store -> arguments of `make_photo_store`."""


class Side:
    """Store whose rows are loaded by distill's loader, or by a bare pool."""

    def __init__(self, store: EmbeddingStore, photos: Path, batch: int) -> None:
        self.store, self.batch = store, batch
        self.photos = None if store.spec.kept_images else photos
        self.records = RecordsByRow(store)
        self.image_size = store.spec.image_size
        self.rows = epoch_order(list(self.records), seed=0, epoch=0)
        self._own = local()

    def load(self, loader: Loader) -> None:
        """Load all rows by the loader, and drop its batches."""
        for _ in loader.batches(split_batches(self.rows, self.batch)):
            pass

    def load_bare(self, pool: ThreadPoolExecutor) -> None:
        """Load all rows by a pool's threads, each with one buffer for an embedding."""
        list(pool.map(self._load_row, self.rows))

    def _load_row(self, row: int) -> None:
        self.decode(row)
        self.read(row)

    def decode(self, row: int) -> DecodedImage:
        """Return the row's image, from its file or kept in the store, decoded and resized."""
        if self.photos is None:
            data = self.store.read_image(row)
        else:
            data = (self.photos / self.records[row].key).read_bytes()
        return load_image(data, self.image_size)

    def read(self, row: int) -> None:
        """Read the row's embedding from the store, verified, into the thread's buffer."""
        if not hasattr(self._own, "place"):
            self._own.place = self.store.reader.empty_batch(1)
        self.store.read([row], self._own.place)


@click.command()
@click.option("--photos", default=48, show_default=True, help="Photos to generate.")
@click.option("--rounds", default=3, show_default=True, help="Passes; the median counts.")
@click.option("--batch", default=8, show_default=True, help="Images in a batch.")
@click.option(
    "--threads",
    multiple=True,
    type=int,
    help="Threads; may be repeated  [default: 1, 2, 4, ... up to all cores]",
)
@click.option(
    "--height",
    default=1500,
    show_default=True,
    help="Height of the photos in pixels; they are 1.5 times as wide.",
)
@click.option(
    "--image-size", default=1024, show_default=True, help="Longer side in pixels that they are resized to."
)
@click.option("--json", "as_json", is_flag=True)
def main(
    photos: int,
    rounds: int,
    batch: int,
    threads: tuple[int, ...],
    height: int,
    image_size: int,
    as_json: bool,
) -> None:
    """Print the speed of distill's loader, and of its parts."""
    keep_freed_memory()
    figures: list[Figure] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="loader-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        root = make_large_photos(folder / "photos", photos, height, height * 3 // 2)
        for number, (name, options) in enumerate(STORES.items()):
            path = make_photo_store(folder / f"{number}.zarr", root, image_size, **options)
            side = Side(stack.enter_context(EmbeddingStore.open(path)), root, batch)
            for count in threads or _thread_counts():
                figures.append(_overhead(name, side, count, rounds))
            notes += _parts(name, side, rounds)
    report(figures, notes, as_json=as_json)


def _thread_counts() -> list[int]:
    """Return 1, 2, 4, ... and the number of cores."""
    cores = len(os.sched_getaffinity(0))
    return sorted({cores, *(2**power for power in range(cores.bit_length()) if 2**power <= cores)})


def _overhead(name: str, side: Side, threads: int, rounds: int) -> Figure:
    """Compare the loader with a bare pool of as many threads."""
    with (
        Loader(side.store, side.records, side.photos, workers=threads) as loader,
        ThreadPoolExecutor(threads) as pool,
    ):
        seconds = by_turns(
            {"loader": partial(side.load, loader), "bare": partial(side.load_bare, pool)}, rounds
        )
    loader_rate, bare_rate = (len(side.rows) / seconds[which] for which in ("loader", "bare"))
    return Figure(
        what=f"loader / bare decoding and reading: {name}, {threads} thread{'s' * (threads > 1)}",
        value=loader_rate / bare_rate,
        target=TARGET,
        sides=f"{loader_rate:.3g} / {bare_rate:.3g} images/s",
    )


def _parts(name: str, side: Side, rounds: int) -> list[str]:
    """Measure an image's cost on one core, by part; compute the cores that an H100's step would need."""
    images = [side.decode(row) for row in range(len(side.records))]
    size = side.image_size

    def assemble() -> None:
        for rows in split_batches(range(len(images)), side.batch):
            canvas_BHWC = np.empty((len(rows), size, size, 3), np.uint8)
            side.store.reader.empty_batch(len(rows))
            for place, row in enumerate(rows):
                place_on_canvas(images[row], canvas_BHWC[place])

    def each(part: Callable[[int], object]) -> None:
        for row in side.rows:
            part(row)

    parts = {
        "decode and resize": partial(each, side.decode),
        "read and verify the embedding": partial(each, side.read),
        "assemble": assemble,
    }
    spent = by_turns(parts, rounds, clock=time.process_time)
    seconds = {part: value / len(images) for part, value in spent.items()}
    whole = sum(seconds.values())
    listed = ", ".join(f"{part} {1000 * value:.2f}" for part, value in seconds.items())
    return [
        f"{name}: ms per image on one core: {listed}; {1 / whole:.3g} images/s per core",
        f"{name}: computed from these, not measured: " + "; ".join(_cores(1 / whole)),
    ]


def _cores(rate: float) -> Sequence[str]:
    return [
        f"an H100 that trains on {step} images/s needs {step / rate:.1f} cores like this one"
        for step in STEP_RATES
    ]


if __name__ == "__main__":
    main()
