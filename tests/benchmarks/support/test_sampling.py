from __future__ import annotations

from benchmarks.support.sampling import Sample, curve


def test_a_point_takes_the_median_of_memory_the_most_descriptors_and_the_time_of_its_stretch() -> None:
    samples = [Sample(n, 100 + 2 * n, n / 2, {"p": n * n}, {"p": 7 if n == 3 else 5}, n) for n in range(1, 9)]
    points = curve(samples, rows=8, points=2)
    assert [(p.images, p.resident["p"], p.descriptors["p"]) for p in points] == [(4, 6.5, 7), (8, 42.5, 5)]
    assert [(p.wall, p.processor) for p in points] == [(2.0, 0.5)] * 2
    assert [p.allocated for p in points] == [2.5, 6.5]
