"""Embedding of a batch, and its way back to the host's memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mobilesam.precompute.decode import Batch
from mobilesam.precompute.shard_task import Embeddings, _recorded, embed
from mobilesam.precompute.worker import warm_up
from mobilesam.sam import normalize_and_pad
from mobilesam.sam.teacher import Teacher, load_teacher

SIDE = 64


def _batch(seed: int) -> Batch:
    canvas_BHWC = np.random.default_rng(seed).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    return Batch(images=(), canvas_BHWC=canvas_BHWC, sizes_B2=np.array([[SIDE, 40], [20, SIDE]]))


def _expected(teacher: Teacher, batch: Batch) -> np.ndarray:
    pixels = normalize_and_pad(torch.from_numpy(batch.canvas_BHWC), torch.from_numpy(batch.sizes_B2))
    return teacher.embed(pixels).cpu().numpy()


def _teacher(device: str) -> Teacher:
    return load_teacher("vit_nano", None, image_size=SIDE, device=device)


def test_a_batchs_embeddings_are_the_teachers() -> None:
    teacher, batch = _teacher("cpu"), _batch(0)
    assert np.array_equal(embed(teacher, batch).numpy(), _expected(teacher, batch))


def test_on_a_cpu_nothing_is_copied() -> None:
    emb_BCHW = torch.arange(12.0).reshape(1, 3, 2, 2)
    assert Embeddings(emb_BCHW).numpy().ctypes.data == emb_BCHW.data_ptr()


@pytest.mark.cuda
def test_on_a_gpu_each_batch_comes_back_in_its_own_pinned_memory() -> None:
    teacher = _teacher("cuda")
    batches = [_batch(seed) for seed in range(8)]
    expected = [_expected(teacher, batch) for batch in batches]
    launched = [embed(teacher, batch) for batch in batches]
    for coming, right in zip(launched, expected, strict=True):
        assert coming._emb_BCHW.is_pinned()
        assert np.abs(coming.numpy() - right).max() <= 1e-5 * np.ptp(right)
        assert coming.device_seconds is not None
        assert 0 < coming.device_seconds < 60


@pytest.mark.cuda
def test_the_first_batch_on_a_gpu_takes_no_longer_than_others_once_it_is_warm() -> None:
    teacher = _teacher("cuda")
    warm_up(teacher, 2)
    seconds = []
    for seed in range(8):
        launched = embed(teacher, _batch(seed))
        launched.numpy()
        seconds.append(launched.device_seconds)
    assert seconds[0] < 20 * sorted(seconds)[4]


class FakeEvent:
    """Stands for a CUDA event: the time in milliseconds at which it was recorded is a count of events."""

    made = 0

    def __init__(self, **options: bool) -> None:
        assert options == {"enable_timing": True, "blocking": True}

    def record(self, stream: object) -> None:
        FakeEvent.made += 1
        self.at = 250.0 * FakeEvent.made

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_a_gpus_time_for_a_batch_is_that_between_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    device = torch.device("cuda", 0)
    coming = Embeddings(torch.zeros(1, 3, 2, 2), _recorded(device))
    coming._computed, coming._arrived = _recorded(device), _recorded(device)
    assert coming.device_seconds is None
    coming.numpy()
    assert coming.device_seconds == 0.25
