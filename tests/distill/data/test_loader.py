from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mobilesam.distill import Loader
from mobilesam.distill.data.rows import RecordsByRow
from mobilesam.sam import ImageError, valid_cells
from mobilesam.store import EmbeddingStore, ImageRecord, StoreDamaged

SIZES = [(40, 60), (64, 64), (60, 30), (20, 64), (64, 50)]


@pytest.fixture
def images(save_images: Callable[..., Path]) -> Path:
    """Image files that a test may change."""
    return save_images(SIZES)


@pytest.fixture
def opened(
    images: Path, make_store: Callable[..., Path]
) -> Iterator[Callable[..., tuple[EmbeddingStore, Loader]]]:
    """opened(...) -> a store made with these options, and a loader over it."""
    to_close: list[EmbeddingStore | Loader] = []

    def open_both(workers: int = 2, **options: object) -> tuple[EmbeddingStore, Loader]:
        store = EmbeddingStore.open(make_store(images, **options))
        loader = Loader(store, RecordsByRow(store), images, workers=workers)
        to_close.extend([loader, store])
        return store, loader

    yield open_both
    for thing in to_close:
        thing.close()


def reference(images: Path, row: int) -> np.ndarray:
    """Return the image with its longest side resized to 64, by Pillow alone."""
    image = Image.open(sorted(images.iterdir())[row])
    scale = 64 / max(image.size)
    return np.asarray(
        image.resize([int(side * scale + 0.5) for side in image.size], Image.Resampling.BILINEAR)
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_a_batch_pairs_each_image_with_its_own_embedding(
    images: Path, opened: Callable[..., tuple[EmbeddingStore, Loader]], dtype: str
) -> None:
    store, loader = opened(dtype=dtype)
    seen = []
    for batch in loader.batches([[3, 0], [4, 2, 1]]):
        stored = store.read(batch.rows)
        assert np.array_equal(batch.values_BCHW.numpy(), stored.values)
        if dtype == "int8":
            assert batch.scales_BC is not None
            assert np.array_equal(batch.scales_BC.numpy(), stored.scales)
        else:
            assert batch.scales_BC is None
        for place, row in enumerate(batch.rows):
            wanted = reference(images, row)
            height, width = wanted.shape[:2]
            canvas = batch.canvas_BHWC[place].numpy()
            assert batch.sizes_B2[place].tolist() == [height, width]
            assert np.array_equal(canvas[:height, :width], wanted)
            assert not canvas[height:].any()
            assert not canvas[:, width:].any()
            assert np.array_equal(batch.valid_BHW[place].numpy(), valid_cells((height, width), 64))
        seen.append(batch.rows)
    assert seen == [[3, 0], [4, 2, 1]]


def test_valid_cells_are_known_before_anything_is_decoded(
    images: Path, opened: Callable[..., tuple[EmbeddingStore, Loader]]
) -> None:
    _, loader = opened()
    for file in images.iterdir():
        file.unlink()
    assert loader.valid([3]).sum() == 1 * 4 + 0  # 20 of 64 pixels high: one row of cells, four wide


def test_the_loader_reads_ahead_but_not_without_bound(
    opened: Callable[..., tuple[EmbeddingStore, Loader]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, loader = opened(workers=1)
    decoded: list[int] = []
    enough = threading.Event()
    decode = loader._decode

    def counting(record: object) -> object:
        decoded.append(1)
        if len(decoded) >= 3:
            enough.set()
        return decode(record)

    monkeypatch.setattr(loader, "_decode", counting)
    with closing(loader.batches([[row % 5] for row in range(50)])) as batches:
        next(batches)
        assert enough.wait(30), "two images beyond the first are prepared unasked"
        for _ in range(5):
            next(batches)
        # Six batches were handed out; two workers' worth may be under way.
        assert len(decoded) <= 6 + 2


def test_no_thread_is_idle_while_another_fills_the_last_place_of_a_batch(
    opened: Callable[..., tuple[EmbeddingStore, Loader]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, loader = opened(workers=2)
    next_begun, decode = threading.Event(), loader._decode

    def blocking(record: ImageRecord) -> object:
        if record.row == 3:
            assert next_begun.wait(30), "the next batch waits for this one"
        if record.row == 4:
            next_begun.set()
        return decode(record)

    monkeypatch.setattr(loader, "_decode", blocking)
    with closing(loader.batches([[0, 1, 2, 3], [4]])) as batches:
        assert [batch.rows for batch in batches] == [[0, 1, 2, 3], [4]]


def test_a_changed_image_stops_the_loader_by_name_even_at_the_same_length(
    images: Path, opened: Callable[..., tuple[EmbeddingStore, Loader]]
) -> None:
    _, loader = opened()
    file = images / "02.png"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.raises(ImageError, match=r"02\.png.*changed since precompute"):
        list(loader.batches([[0, 1], [2, 3]]))


def test_a_missing_image_stops_its_batches_by_name_and_the_loader_still_works(
    images: Path, opened: Callable[..., tuple[EmbeddingStore, Loader]]
) -> None:
    _, loader = opened()
    (images / "01.png").unlink()
    with pytest.raises(ImageError, match=r"01\.png"):
        list(loader.batches([[1, 0], [2]]))
    assert [batch.rows for batch in loader.batches([[2], [3]])] == [[2], [3]]


def test_an_images_hash_is_checked_on_first_use_and_its_length_always(
    images: Path, opened: Callable[..., tuple[EmbeddingStore, Loader]]
) -> None:
    _, loader = opened()
    list(loader.batches([[0]]))
    file = images / "00.png"
    file.write_bytes(file.read_bytes() + b"0")
    with pytest.raises(ImageError, match=r"00\.png.*bytes then"):
        list(loader.batches([[0]]))


def test_a_flipped_bit_in_an_embedding_stops_the_loader(
    images: Path, opened: Callable[..., tuple[EmbeddingStore, Loader]]
) -> None:
    store, loader = opened()
    shard = next(path for path in (store.path / "embeddings").iterdir() if path.name.startswith("c"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 4
    shard.write_bytes(data)
    with pytest.raises(StoreDamaged, match="row 0"):
        list(loader.batches([[1], [0]]))


def test_waiting_for_data_is_measured(
    opened: Callable[..., tuple[EmbeddingStore, Loader]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, loader = opened(workers=1)
    waiting, now = threading.Event(), [0.0]
    decode = loader._decode

    def clock() -> float:
        seconds = now[0]
        waiting.set()
        return seconds

    def slow(record: object) -> object:
        assert waiting.wait(30)
        now[0] += 0.25
        return decode(record)

    monkeypatch.setattr(loader, "_decode", slow)
    monkeypatch.setattr("mobilesam.distill.data.loader.time", SimpleNamespace(perf_counter=clock))
    list(loader.batches([[0]]))
    assert loader.waited == 0.25


def test_a_smaller_canvas_is_of_the_original_image_and_the_rest_has_the_frame_of_the_square(
    save_images: Callable[..., Path], make_store: Callable[..., Path]
) -> None:
    images = save_images([(90, 200), (150, 100)])
    with EmbeddingStore.open(make_store(images)) as store:
        records = RecordsByRow(store)
        with (
            Loader(store, records, images, workers=1) as whole,
            Loader(store, records, images, workers=1, student_size=32) as small,
        ):
            (full,), (batch,) = whole.batches([[0, 1]]), small.batches([[0, 1]])
    assert batch.canvas_BHWC.shape == (2, 32, 32, 3)
    assert batch.canvas_sizes_B2.tolist() == [[14, 32], [32, 21]]
    for place, file in enumerate(sorted(images.iterdir())):
        height, width = batch.canvas_sizes_B2[place].tolist()
        wanted = np.asarray(Image.open(file).resize((width, height), Image.Resampling.BILINEAR))
        canvas = batch.canvas_BHWC[place].numpy()
        assert np.array_equal(canvas[:height, :width], wanted)
        assert not canvas[height:].any()
        assert not canvas[:, width:].any()
    assert full.canvas_sizes_B2.tolist() == full.sizes_B2.tolist() == batch.sizes_B2.tolist()
    assert bool((full.valid_BHW == batch.valid_BHW).all())
    assert bool((full.values_BCHW == batch.values_BCHW).all())
