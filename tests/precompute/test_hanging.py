"""Images that take for ever to read and decode, on a cluster in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mobilesam.common.image_ref import ImageRef
from mobilesam.precompute import PrecomputeConfig, PrecomputeError, dry_run
from mobilesam.precompute import decode as decoders
from mobilesam.precompute import decode as decoding
from mobilesam.precompute.decode import Decoders
from mobilesam.precompute.messages import TaskImage
from mobilesam.precompute.sizing import batch_timeout
from mobilesam.sam import DecodedImage, load_image
from mobilesam.store import EmbeddingStore

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Decoding of what ends in HANG lasts until this is set."""
    event = threading.Event()

    def hanging(data: bytes, image_size: int) -> DecodedImage:
        if data.endswith(b"HANG"):
            event.wait()
        return load_image(data, image_size)

    monkeypatch.setattr(decoding, "load_image", hanging)
    yield event
    event.set()


def _hang(*photos: Path) -> None:
    for photo in photos:
        with photo.open("ab") as file:
            file.write(b"HANG")


def _embeddings(path: Path) -> dict[str, bytes]:
    with EmbeddingStore.open(path) as store:
        return {record.key: store.read([record.row]).values.tobytes() for record in store.manifest.records("done")}


def test_more_hanging_images_than_threads_fail_alone_and_the_others_are_as_they_were(
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


def test_when_too_many_images_hang_at_once_the_run_ends_and_asks_for_the_disk(
    run: Run, photos: Path, tmp_path: Path, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "STUCK_ALLOWED", 2)
    _hang(*sorted(photos.iterdir())[:3])
    with pytest.raises(PrecomputeError, match=r"3 images at once took longer than 0\.5 s .*disk or server"):
        run(image_timeout=0.5)
    with EmbeddingStore.open(tmp_path / "store.zarr") as store:
        assert store.manifest.counts().failed == 0, "of a disk that went away, no image is to blame"
    release.set()
    assert run(image_timeout=60)["done"] == 7


def test_a_dry_run_passes_over_a_hanging_image(
    photos: Path, tmp_path: Path, release: threading.Event
) -> None:
    _hang(photos / "0-admiral.png")
    plan = dry_run(
        PrecomputeConfig(
            images=(photos,), out=tmp_path / "s.zarr", teacher="vit_nano", image_size=64, image_timeout=3
        )
    )
    assert plan["seconds_per_image"] > 0


def _images(count: int) -> list[TaskImage]:
    return [TaskImage(row=row, ref=ImageRef(key=str(row), size=0)) for row in range(count)]


def test_threads_give_results_in_order_and_raise_what_was_raised() -> None:
    def load(image: TaskImage) -> int:
        time.sleep(0.01 * (image.row % 3))
        if image.row == 5:
            raise MemoryError
        return image.row

    pool = Decoders(3, 60, load)
    jobs = [pool.submit(image) for image in _images(8)]
    assert [pool.result(job) for job in jobs[:5]] == [0, 1, 2, 3, 4]
    with pytest.raises(MemoryError):
        pool.result(jobs[5])
    assert [pool.result(job) for job in jobs[6:]] == [6, 7]
    pool.close()


def test_a_closed_pool_starts_nothing_more_and_its_threads_end() -> None:
    release, began, threads = threading.Event(), [], []

    def load(image: TaskImage) -> int:
        began.append(image.row)
        threads.append(threading.current_thread())
        release.wait()
        return image.row

    pool = Decoders(1, 60, load)
    for image in _images(3):
        pool.submit(image)
    while not threads:
        time.sleep(0.01)
    pool.close()
    release.set()
    threads[0].join()
    assert began == [0]


def test_a_batch_may_take_twenty_times_the_slowest_and_vit_h_on_a_slow_cpu_half_an_hour() -> None:
    assert batch_timeout(1, None) == 1800
    assert batch_timeout(8, None) == 4800
    assert batch_timeout(8, 0.01) == 300
    assert batch_timeout(1, 320.0) == 6400
