from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilesam.sam.modeling.decode_prompts import Prompts
from mobilesam.verify.evaluate.config import DISTANCES
from mobilesam.verify.evaluate.prompts import DIRECTIONS, choose_objects, pair_prompts, point_prompts, seeded

sizes = st.tuples(st.integers(1, 1500), st.integers(1, 2250))
keys = st.text(max_size=8) | st.just("photo\udcff.jpg")


def test_the_distances_are_the_papers() -> None:
    assert DISTANCES == (100, 200, 300, 400, 500)


@given(st.integers(1, 6), sizes)
def test_points_lie_in_the_image_and_are_all_on_the_object(side: int, size: tuple[int, int]) -> None:
    prompts = point_prompts(side, size)
    points_P12, labels_P1 = prompts.points_PN2.numpy(), prompts.labels_PN.numpy()
    assert points_P12.shape == (side * side, 1, 2)
    assert labels_P1.tolist() == [[1]] * side**2
    assert ((points_P12 > 0) & (points_P12 < size[::-1])).all()


@settings(max_examples=40)
@given(st.integers(1, 4), sizes, st.integers(1, 600), st.integers(0, 2**63 - 1), keys)
def test_a_pair_is_so_far_apart_and_in_the_image_or_left_out_and_counted(
    side: int, size: tuple[int, int], distance: int, seed: int, key: str
) -> None:
    prompts, left_out = pair_prompts(side, size, distance, seed, key)
    points_P22, labels_P2 = prompts.points_PN2.numpy(), prompts.labels_PN.numpy()
    assert len(points_P22) + left_out == side * side
    assert labels_P2.tolist() == [[1, 0]] * len(points_P22)
    gap_P = np.hypot(*(points_P22[:, 1] - points_P22[:, 0]).T)
    assert gap_P == pytest.approx(np.full(len(points_P22), distance))
    last = (size[1] - 1, size[0] - 1)
    assert ((points_P22[:, 1] >= 0) & (points_P22[:, 1] <= last)).all()
    wanted = point_prompts(side, size).points_PN2.numpy()
    foreground = {tuple(point) for point in wanted[:, 0].tolist()}
    assert {tuple(point) for point in points_P22[:, 0].tolist()} <= foreground


def test_a_pair_is_left_out_only_where_it_hardly_fits() -> None:
    """In an image of 1500 x 2250 every pair of the paper's fits; farther than the diagonal none does."""
    for distance in DISTANCES:
        assert pair_prompts(4, (1500, 2250), distance, 0, "a.jpg")[1] == 0
    assert pair_prompts(4, (1500, 2250), 2705, 0, "a.jpg")[1] == 16
    assert len(pair_prompts(4, (1500, 2250), 2705, 0, "a.jpg")[0]) == 0


def test_directions_are_uniform() -> None:
    angles = []
    for number in range(300):
        points_P22 = pair_prompts(2, (4000, 4000), 100, 0, f"{number}.jpg")[0].points_PN2.numpy()
        apart_P2 = points_P22[:, 1] - points_P22[:, 0]
        angles += np.arctan2(apart_P2[:, 1], apart_P2[:, 0]).tolist()
    counts, _ = np.histogram(angles, 12, (-np.pi, np.pi))
    # 1200 draws in 12 bins: 100 each, standard deviation 9.6.
    assert (abs(counts - 100) < 5 * 9.6).all()


def test_prompts_follow_from_seed_and_key_alone() -> None:
    def ends(seed: int, key: str, distance: int = 50) -> list:
        points_P22 = pair_prompts(3, (300, 400), distance, seed, key)[0].points_PN2.numpy()
        return points_P22.tolist()

    assert ends(0, "a.jpg") == ends(0, "a.jpg")
    different = [ends(0, "a.jpg"), ends(1, "a.jpg"), ends(0, "b.jpg"), ends(0, "a.jpg", 51)]
    assert all(one != other for i, one in enumerate(different) for other in different[:i])


def test_a_pairs_direction_does_not_depend_on_whether_others_fit() -> None:
    """The first direction that fits is taken, of the same ones in an image of any size."""
    rng = seeded(3, "pair 100", "a.jpg")
    drawn = [rng.uniform(0, 2 * np.pi, DIRECTIONS) for _ in range(16)]
    points_P22 = pair_prompts(4, (150, 600), 100, 3, "a.jpg")[0].points_PN2.numpy()
    centres = point_prompts(4, (150, 600)).points_PN2.numpy()
    place = {tuple(point): index for index, point in enumerate(centres[:, 0].tolist())}
    for foreground, background in points_P22:
        angle = np.arctan2(*(background - foreground)[::-1]) % (2 * np.pi)
        assert np.isclose(drawn[place[tuple(foreground.tolist())]], angle).any()


@given(st.integers(0, 300), st.integers(1, 100), st.integers(0, 5))
def test_objects_are_drawn_once_each_and_in_order(count: int, most: int, seed: int) -> None:
    chosen = choose_objects(count, most, seed, "a.jpg")
    assert len(chosen) == min(count, most)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(count))
    assert chosen == choose_objects(count, most, seed, "a.jpg")


def test_other_images_and_seeds_draw_other_objects() -> None:
    drawn = [choose_objects(200, 10, *which) for which in ((0, "a"), (1, "a"), (0, "b"))]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_parts_are_all_prompts_in_order() -> None:
    boxes_P4 = np.arange(28.0).reshape(7, 4)
    parts = list(Prompts.of_boxes(boxes_P4).parts(3))
    assert [len(part) for _, part in parts] == [3, 3, 1]
    assert [where for where, _ in parts] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert np.array_equal(np.concatenate([part.boxes_P4 for _, part in parts]), boxes_P4)
