"""Speed of reading embeddings from our store against other formats.

    python -m benchmarks.store

writes the same random embeddings in every format, and reads all of them in random batches of 16: with the files
dropped from the system's cache before each pass (cold), and with everything in it (warm, for the processor's time).
Passes of the sides alternate; figures are medians. Our store verifies every row, the others verify nothing.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
import tracemalloc
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import click
import numpy as np

from benchmarks.support.baseline_formats import FlatRecord, Format, Memmap, NpyPerImage, Preadv, Streaming
from benchmarks.support.figures import Figure, report
from benchmarks.support.large_store import make_large_store
from benchmarks.support.synthetic_store import ALL_IMAGES, synthetic_embedding, synthetic_spec
from mobilesam.store import EmbeddingStore, ImageRef, RowResult, ShardWriter

BATCH = 16
SHAPE = (256, 64, 64)
LISTED_ROWS = 112_000


@click.command()
@click.option("--rows", default=256, show_default=True, help="Embeddings in each format.")
@click.option("--rounds", default=5, show_default=True, help="Passes of each side; the median counts.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder on the disk to measure  [default: a temporary one]"
)
@click.option("--json", "as_json", is_flag=True)
def main(rows: int, rounds: int, out: Path | None, as_json: bool) -> None:
    """Print how fast embeddings are read from our store, and from files of other kinds."""
    with tempfile.TemporaryDirectory(prefix="store-", dir=out) as temporary, ExitStack() as stack:
        folder = Path(temporary)
        sides = _sides(folder, rows, stack)
        os.sync()
        cold, warm = _measure(folder, sides, rows, rounds)
        figures = [
            *_speeds(cold, rows),
            *_processor(warm, rows),
            *_memory(sides),
            *_disk(folder, sides, rows),
        ]
        figures.append(_listing(folder))
        notes = ["format: GB/s cold, rows/s cold, ms of processor time per row warm"]
        for name, seconds in cold.items():
            size = _row_bytes(name) * rows / seconds / 1e9
            notes.append(f"{name}: {size:.2f}, {rows / seconds:.0f}, {1000 * warm[name] / rows:.2f}")
        if not Streaming.installed():
            notes.append("MosaicML Streaming is not installed: pip install 'mobilesam[bench]'")
        report(figures, notes, as_json=as_json)


def _rows(count: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(0)
    for _ in range(count):
        yield synthetic_embedding(generator)


class Ours:
    """Our store, opened in one way, read into a reused batch as the trainer does."""

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store
        self._batch = store.reader.empty_batch(BATCH)

    def read(self, rows: Sequence[int]) -> np.ndarray:
        return self.store.read(rows, self._batch if len(rows) == BATCH else None).values


def _sides(folder: Path, count: int, stack: ExitStack) -> dict[str, Format]:
    made: dict[str, Callable[[Path], Format]] = {
        ".npy float16": lambda place: NpyPerImage(place, _rows(count), "float16"),
        ".npy float32": lambda place: NpyPerImage(place, _rows(count), "float32"),
        "raw preadv float16": lambda place: Preadv(place, _rows(count), "float16"),
        "memmap float16": lambda place: Memmap(place, _rows(count), "float16"),
        "flat record float16": lambda place: FlatRecord(place, _rows(count), "float16"),
    }
    if Streaming.installed():
        made["MosaicML Streaming float16"] = lambda place: Streaming(place, _rows(count), "float16")
    sides: dict[str, Format] = {}
    for number, (name, make) in enumerate(made.items()):
        place = folder / f"peer{number}"
        place.mkdir()
        sides[name] = make(place)
    for dtype in ("float16", "int8"):
        path = _make_store(folder / f"{dtype}.zarr", dtype, count)
        for way, direct in (("buffered", False), ("O_DIRECT", True)):
            store = stack.enter_context(EmbeddingStore.open(path, direct_io=direct))
            sides[f"ours {dtype} {way}"] = Ours(store)
    return sides


def _make_store(path: Path, dtype: str, count: int) -> Path:
    spec, head = synthetic_spec(1024, Path("/none"), dtype)
    images = [ImageRef(key=f"{row:06d}.jpg", size=1) for row in range(count)]
    source = _rows(count)
    with EmbeddingStore.create(path, spec, images, ALL_IMAGES, head) as store:
        for shard in store.pending_shards():
            rows, attempt = store.shard_rows(shard), uuid.uuid4().hex[:12]
            with ShardWriter(path, spec.layouts, shard, attempt, len(rows)) as writer:
                results = [_written(writer, row, row - rows.start, next(source)) for row in rows]
                writer.finish()
            store.commit(shard, attempt, results)
    return path


def _written(writer: ShardWriter, row: int, slot: int, emb_CHW: np.ndarray) -> RowResult:
    stored = writer.add(slot, emb_CHW)
    return RowResult(
        row=row,
        sha256=f"{row:064x}",
        bytes=1,
        original_size=(1024, 1024),
        resized_size=(1024, 1024),
        crc32c=stored.crc32c,
        scales_crc32c=stored.scales_crc32c,
    )


def _measure(
    folder: Path, sides: dict[str, Format], rows: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the seconds of a cold pass, and the processor seconds of a warm one, by side."""
    generator = np.random.default_rng(1)
    cold: dict[str, list[float]] = {name: [] for name in sides}
    warm: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        order = [int(row) for row in generator.permutation(rows)]
        batches = [order[start : start + BATCH] for start in range(0, rows, BATCH)]
        for name, side in sides.items():
            _forget(folder)
            began = time.perf_counter()
            _read_all(side, batches)
            cold[name].append(time.perf_counter() - began)
        for name, side in sides.items():
            _read_all(side, batches)
            began = _processor_seconds()
            _read_all(side, batches)
            warm[name].append(_processor_seconds() - began)
    return _medians(cold), _medians(warm)


def _read_all(side: Format, batches: Sequence[Sequence[int]]) -> None:
    for batch in batches:
        side.read(batch)


def _forget(folder: Path) -> None:
    """Drop all files in a folder from the system's cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(times) for name, times in seconds.items()}


def _row_bytes(name: str) -> int:
    width = 4 if "float32" in name else 1 if "int8" in name else 2
    return width * int(np.prod(SHAPE))


def _speeds(cold: dict[str, float], rows: int) -> list[Figure]:
    wanted = [
        ("ours float16 buffered", ".npy float16", 0.85),
        ("ours float16 O_DIRECT", ".npy float16", 1.3),
        ("ours float16 buffered", ".npy float32", 1.6),
        ("ours float16 O_DIRECT", ".npy float32", 2.4),
        ("ours int8 buffered", ".npy float16", 1.7),
        ("ours int8 O_DIRECT", ".npy float16", 2.8),
    ]
    return [
        Figure(
            what=f"cold batches of {BATCH}: {ours} / {theirs}",
            value=cold[theirs] / cold[ours],
            target=target,
            sides=f"{rows / cold[ours]:.0f} / {rows / cold[theirs]:.0f} rows/s",
        )
        for ours, theirs, target in wanted
    ]


def _processor(warm: dict[str, float], rows: int) -> list[Figure]:
    base = warm["raw preadv float16"]
    return [
        Figure(
            what=f"processor time per row, warm: {ours} / raw preadv float16",
            value=warm[ours] / base,
            target=target,
            at_least=False,
            sides=f"{1000 * warm[ours] / rows:.2f} / {1000 * base / rows:.2f} ms",
        )
        for ours, target in (("ours float16 buffered", 1.6), ("ours int8 buffered", 0.8))
    ]


def _memory(sides: dict[str, Format]) -> list[Figure]:
    found = []
    for name in ("ours float16 buffered", "ours float16 O_DIRECT", "ours int8 O_DIRECT"):
        ours = sides[name]
        assert isinstance(ours, Ours)
        tracemalloc.start()
        batch = ours.store.read(range(BATCH))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        size = batch.values.nbytes + (0 if batch.scales is None else batch.scales.nbytes)
        found.append(
            Figure(
                what=f"memory needed to read a batch / size of the batch: {name}",
                value=peak / size,
                target=1.1,
                at_least=False,
                sides=f"{peak / 2**20:.1f} / {size / 2**20:.1f} MiB",
            )
        )
    return found


def _disk(folder: Path, sides: dict[str, Format], rows: int) -> list[Figure]:
    sizes = {dtype: _allocated(folder / f"{dtype}.zarr") for dtype in ("int8", "float16")}
    ours = sides["ours int8 buffered"]
    assert isinstance(ours, Ours)
    error = total = 0.0
    for row, exact in enumerate(_rows(min(rows, 8))):
        stored = ours.store.read([row]).to_float32()[0]
        error += float(np.square(stored - exact, dtype=np.float64).sum())
        total += float(np.square(exact, dtype=np.float64).sum())
    return [
        Figure(
            what="bytes on disk: int8 / float16",
            value=sizes["int8"] / sizes["float16"],
            target=0.51,
            at_least=False,
            sides=f"{sizes['int8'] / 2**20:.0f} / {sizes['float16'] / 2**20:.0f} MiB",
        ),
        Figure(
            what="relative MSE of int8, values of a normal distribution",
            value=error / total,
            target=1e-4,
            at_least=False,
            sides=f"{min(rows, 8)} rows",
        ),
    ]


def _allocated(path: Path) -> int:
    return sum(512 * file.stat().st_blocks for file in path.rglob("*") if file.is_file())


def _listing(folder: Path) -> Figure:
    path = folder / "listed.zarr"
    make_large_store(
        path, LISTED_ROWS, pending_shards=10, image_size=1024, image_root=folder, shard_files=False
    )
    times = []
    for _ in range(5):
        began = time.perf_counter()
        with EmbeddingStore.open(path) as store:
            shards = store.manifest.committed_shards()
            failed = store.manifest.shards_with_failures()
        times.append(time.perf_counter() - began)
    return Figure(
        what=f"milliseconds to open a store and find out which of {LISTED_ROWS:,} rows exist",
        value=1000 * median(times),
        target=20,
        at_least=False,
        sides=f"{len(shards):,} committed shards, {len(failed):,} of them with a failed row",
    )


if __name__ == "__main__":
    main()
