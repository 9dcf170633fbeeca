"""Decode pool: images that hang, the order of results, errors; runs on a cluster in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mobilesam.common.image_ref import ImageRef
from mobilesam.precompute import PrecomputeConfig, PrecomputeError, decode, dry_run
from mobilesam.precompute.decode import DecodePool
from mobilesam.precompute.messages import TaskImage
from mobilesam.sam import DecodedImage, load_image
from mobilesam.store import EmbeddingStore

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Event until which decoding of a file that ends in HANG lasts."""
    event = threading.Event()

    def hanging(data: bytes, image_size: int) -> DecodedImage:
        if data.endswith(b"HANG"):
            event.wait()
        return load_image(data, image_size)

    monkeypatch.setattr(decode, "load_image", hanging)
    yield event
    event.set()


def _hang(*photos: Path) -> None:
    for photo in photos:
        with photo.open("ab") as file:
            file.write(b"HANG")


def _embeddings(path: Path) -> dict[str, bytes]:
    with EmbeddingStore.open(path) as store:
        return {
            record.key: store.read([record.row]).values.tobytes() for record in store.manifest.records("done")
        }


def test_more_hanging_images_than_threads_fail_alone_and_change_no_other_embedding(
    run: Run, photos: Path, tmp_path: Path, release: threading.Event
) -> None:
    run("whole.zarr", batch_size=3)
    hanging = ["0-admiral.png", "2-coffee.png", "3-galaxies.png"]
    _hang(*(photos / name for name in hanging))
    result = run(batch_size=3, image_timeout=4)
    assert (result["done"], result["failed"]) == (4, 3)
    with EmbeddingStore.open(tmp_path / "store.zarr") as store:
        failed = store.manifest.records("failed")
    assert [record.key for record in failed] == hanging
    assert {record.reason for record in failed} == {
        "reading and decoding it took longer than 4 s (--image-timeout)"
    }
    whole = _embeddings(tmp_path / "whole.zarr")
    assert _embeddings(tmp_path / "store.zarr") == {
        key: emb for key, emb in whole.items() if key not in hanging
    }
    release.set()
    assert run(retry_failed=True, batch_size=3)["done"] == 7
    assert _embeddings(tmp_path / "store.zarr") == whole


def test_too_many_images_that_hang_at_once_end_the_run_with_a_hint_at_the_disk(
    run: Run, photos: Path, tmp_path: Path, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "HUNG_ALLOWED", 2)
    _hang(*sorted(photos.iterdir())[:3])
    with pytest.raises(PrecomputeError, match=r"3 images at once took longer than 0\.5 s .*disk or server"):
        run(image_timeout=0.5)
    with EmbeddingStore.open(tmp_path / "store.zarr") as store:
        assert store.manifest.counts().failed == 0, "of a disk that went away, no image is to blame"
    release.set()
    assert run(image_timeout=60)["done"] == 7


def test_a_dry_run_skips_a_hanging_image(photos: Path, tmp_path: Path, release: threading.Event) -> None:
    _hang(photos / "0-admiral.png")
    plan = dry_run(
        PrecomputeConfig(
            images=(photos,), out=tmp_path / "s.zarr", teacher="vit_nano", image_size=64, image_timeout=3
        )
    )
    assert plan["seconds_per_image"] > 0


def _images(count: int) -> list[TaskImage]:
    return [TaskImage(row=row, ref=ImageRef(key=str(row), size=0)) for row in range(count)]


def test_the_pool_returns_results_in_order_and_raises_the_loaders_errors() -> None:
    def load(image: TaskImage) -> int:
        time.sleep(0.01 * (image.row % 3))
        if image.row == 5:
            raise MemoryError
        return image.row

    pool = DecodePool(3, 60, load)
    futures = [pool.submit(image) for image in _images(8)]
    assert [pool.result(future) for future in futures[:5]] == [0, 1, 2, 3, 4]
    with pytest.raises(MemoryError):
        pool.result(futures[5])
    assert [pool.result(future) for future in futures[6:]] == [6, 7]
    pool.close()


def test_a_closed_pool_starts_no_more_images_and_its_threads_end() -> None:
    release, began, threads = threading.Event(), [], []

    def load(image: TaskImage) -> int:
        began.append(image.row)
        threads.append(threading.current_thread())
        release.wait()
        return image.row

    pool = DecodePool(1, 60, load)
    for image in _images(3):
        pool.submit(image)
    while not threads:
        time.sleep(0.01)
    pool.close()
    release.set()
    threads[0].join()
    assert began == [0]
