"""Sizes of shards and batches, and time limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilesam.precompute import sizing


@pytest.mark.parametrize(
    ("images", "workers", "seconds", "expected"),
    [
        (100_000, 8, 0.02, 64),
        (100_000, 1, 60.0, 5),
        (100_000, 1, 1000.0, 1),
        (12, 1, 0.1, 6),
        (12, 2, 0.1, 3),
        (1, 1, 0.1, 1),
        (2, 1, 64.0, 1),
        (100_000, 1, 0.0, 64),
    ],
)
def test_shard_size_by_time_and_workers(images: int, workers: int, seconds: float, expected: int) -> None:
    assert sizing.shard_size(images, workers, seconds) == expected


@given(images=st.integers(1, 10**7), workers=st.integers(1, 64), seconds=st.floats(0.001, 1e4))
def test_a_shard_has_one_to_64_images_and_takes_no_more_than_five_minutes(
    images: int, workers: int, seconds: float
) -> None:
    size = sizing.shard_size(images, workers, seconds)
    assert 1 <= size <= 64
    assert size == 1 or size * seconds <= 300


def test_a_larger_teacher_or_picture_is_expected_to_take_longer() -> None:
    def cost(teacher: str, image_size: int) -> float:
        return sizing.estimated_seconds(teacher, image_size, 1e11)

    assert cost("vit_nano", 1024) < cost("vit_b", 1024) < cost("vit_l", 1024) < cost("vit_h", 1024)
    assert cost("vit_b", 256) < cost("vit_b", 1024)


@pytest.mark.parametrize(
    ("asked", "device_type", "shard_size", "expected"),
    [(None, "cpu", 64, 1), (None, "cuda", 64, 8), (None, "cuda", 3, 3), (5, "cpu", 64, 5), (5, "cpu", 3, 3)],
)
def test_batch_size_by_device_and_never_larger_than_a_shard(
    asked: int | None, device_type: str, shard_size: int, expected: int
) -> None:
    assert sizing.batch_size(asked, device_type, shard_size) == expected


def test_a_batch_may_take_twenty_times_the_slowest_and_the_first_half_an_hour() -> None:
    assert sizing.batch_timeout(1, None) == 1800
    assert sizing.batch_timeout(8, None) == 4800
    assert sizing.batch_timeout(8, 0.01) == 300
    assert sizing.batch_timeout(1, 320.0) == 6400


@pytest.mark.parametrize(
    ("device", "seconds", "images", "expected"),
    [
        ("cuda", 1 / 83, 100_000, 256),
        ("cuda", 1 / 83, 400, 50),
        ("cuda", 1 / 15, 100_000, 64),
        ("cpu", 1 / 83, 100_000, 64),
        ("cuda", 0.0, 100_000, 256),
    ],
)
def test_a_fast_gpu_gets_larger_shards(device: str, seconds: float, images: int, expected: int) -> None:
    assert sizing.shard_size(images, 4, seconds, device) == expected
