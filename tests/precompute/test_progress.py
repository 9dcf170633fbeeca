"""Progress of a run, counted in images."""

from __future__ import annotations

from mobilesam.precompute.progress import Progress


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def _progress(images: int = 20, done_before: int = 0) -> tuple[Progress, _Clock]:
    progress, clock = Progress(images, done_before, 0), _Clock()
    progress._clock = clock
    return progress, clock


def test_rows_count_as_soon_as_their_batch_is_computed() -> None:
    progress, clock = _progress(done_before=4)
    progress.add_batch(0, "a", 2, 0)
    clock.now += 2
    progress.add_batch(0, "a", 2, 1)
    snapshot = progress.snapshot()
    assert (snapshot.computed, snapshot.failed) == (8, 1)
    assert snapshot.images_per_second == 2.0
    assert snapshot.eta == 6.0


def test_a_retried_shard_counts_by_its_latest_attempt() -> None:
    progress, _ = _progress()
    progress.add_batch(3, "first", 5, 2)
    progress.add_batch(3, "second", 1, 0)
    assert progress.snapshot().computed == 1
    assert progress.snapshot().failed == 0


def test_a_batch_reported_after_its_commit_does_not_count_twice() -> None:
    progress, _ = _progress()
    progress.add_commit(0, "a", 6, 1)
    progress.add_batch(0, "a", 6, 1)
    assert (progress.snapshot().computed, progress.snapshot().failed) == (6, 1)


def test_there_is_no_rate_and_no_eta_before_the_second_image() -> None:
    progress, _ = _progress()
    assert progress.snapshot().images_per_second is None
    assert progress.snapshot().eta is None
