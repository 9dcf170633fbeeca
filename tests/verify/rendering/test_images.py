from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from mobilesam.verify.rendering.images import (
    EmbeddingColours,
    common_scale,
    cosine_distance,
    crop_to_valid,
    paint_error,
    png_uri,
    thumbnail_uri,
)

RNG = np.random.default_rng(0)


def rectangle(rows: int, columns: int, grid: int = 16) -> np.ndarray:
    valid_gg = np.zeros((grid, grid), dtype=bool)
    valid_gg[:rows, :columns] = True
    return valid_gg


def low_rank(valid_gg: np.ndarray, rank: int, channels: int = 32, seed: int = 0) -> np.ndarray:
    """An embedding whose cells vary along `rank` directions, the first one the most."""
    rng = np.random.default_rng(seed)
    directions, _ = np.linalg.qr(rng.normal(size=(channels, rank)))
    weights = rng.normal(size=(rank, *valid_gg.shape)) * (2.0 ** -np.arange(rank))[:, None, None]
    return np.einsum("cr,rij->cij", directions, weights).astype(np.float32)


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_padding_is_cut_off_and_an_image_without_valid_cells_keeps_one():
    grid = np.arange(16 * 16).reshape(16, 16)
    assert np.array_equal(crop_to_valid(grid, rectangle(3, 5)), grid[:3, :5])
    assert np.array_equal(crop_to_valid(grid, rectangle(0, 0)), grid[:1, :1])


def test_components_agree_with_a_singular_value_decomposition():
    valid_gg = rectangle(11, 16)
    emb_CHW = low_rank(valid_gg, 6) + 3.0
    colours = EmbeddingColours.fit([(emb_CHW, valid_gg)])
    cells_LC = emb_CHW[:, :11].reshape(32, -1).T.astype(np.float64)
    _, singular, rows = np.linalg.svd(cells_LC - cells_LC.mean(axis=0))
    assert np.allclose(np.abs(colours.components_3C @ rows[:3].T), np.eye(3), atol=1e-6)
    assert colours.explained == pytest.approx((singular[:3] ** 2).sum() / (singular**2).sum())


def test_padding_has_no_part_in_the_colours():
    valid_gg = rectangle(9, 16)
    emb_CHW = low_rank(valid_gg, 5)
    other_CHW = emb_CHW.copy()
    other_CHW[:, 9:] = 1e4
    one, other = (EmbeddingColours.fit([(emb, valid_gg)]) for emb in (emb_CHW, other_CHW))
    assert np.array_equal(one.components_3C, other.components_3C)
    assert np.array_equal(one.paint(emb_CHW, valid_gg), other.paint(other_CHW, valid_gg))
    assert one.paint(emb_CHW, valid_gg).shape == (9, 16, 3)


def test_signs_do_not_depend_on_the_order_of_the_images():
    pairs = [(low_rank(rectangle(16, 16), 4, seed=seed), rectangle(16, 16)) for seed in range(3)]
    one, other = EmbeddingColours.fit(pairs), EmbeddingColours.fit(pairs[::-1])
    assert np.allclose(one.components_3C, other.components_3C)
    largest = np.abs(one.components_3C).argmax(axis=1)
    assert (one.components_3C[np.arange(3), largest] > 0).all()


def test_teacher_and_student_share_one_scale():
    valid_gg = rectangle(16, 16)
    teacher_CHW = low_rank(valid_gg, 3)
    colours = EmbeddingColours.fit([(teacher_CHW, valid_gg)])
    mean_CHW = teacher_CHW.mean(axis=(1, 2), keepdims=True)
    timid_CHW = mean_CHW + 0.1 * (teacher_CHW - mean_CHW)
    assert np.array_equal(colours.paint(teacher_CHW, valid_gg), colours.paint(teacher_CHW.copy(), valid_gg))
    # A student with a tenth of the teacher's contrast must look flat, not be stretched to full colours.
    spread = [colours.paint(emb, valid_gg).astype(float).std(axis=(0, 1)) for emb in (teacher_CHW, timid_CHW)]
    assert (spread[1] < 0.2 * spread[0]).all()


def test_a_teacher_without_variance_is_grey():
    valid_gg = rectangle(16, 16)
    colours = EmbeddingColours.fit([(np.ones((32, 16, 16), np.float32), valid_gg)])
    assert set(np.unique(colours.paint(np.ones((32, 16, 16), np.float32), valid_gg))) == {128}
    assert colours.explained == 0


def test_cosine_distance_agrees_with_torch_and_survives_zero_vectors():
    torch = pytest.importorskip("torch")
    student_CHW, teacher_CHW = RNG.normal(size=(2, 32, 16, 16))
    expected = 1 - torch.nn.functional.cosine_similarity(
        torch.tensor(student_CHW), torch.tensor(teacher_CHW), dim=0
    )
    error_HW = cosine_distance(student_CHW, teacher_CHW, rectangle(7, 12))
    assert np.allclose(error_HW, expected.numpy()[:7, :12])
    assert (cosine_distance(np.zeros_like(teacher_CHW), teacher_CHW, rectangle(7, 12)) == 1).all()


@pytest.mark.parametrize(
    ("errors", "top"),
    [
        ([0.0, 0.0], 0.001),
        ([-2e-16, 3e-16], 0.001),
        ([0.0131] * 9, 0.015),
        ([0.97] * 9, 1.0),
        ([0.2] * 9, 0.2),
        ([1.7] * 9, 2.0),
    ],
)
def test_the_common_scale_is_round_and_holds_the_errors(errors, top):
    assert common_scale([np.array(errors)]) == top


def test_error_colours_brighten_with_the_error_and_stop_at_the_top():
    painted = paint_error(np.array([[0.0, 0.02, 0.1, 0.2, 0.5]]), 0.2).astype(int).sum(axis=-1)[0]
    assert (np.diff(painted[:4]) > 0).all()
    assert painted[3] == painted[4]


def test_data_uris_hold_the_pictures():
    rgb_HW3 = RNG.integers(0, 256, size=(6, 9, 3), dtype=np.uint8)
    assert png_uri(rgb_HW3).startswith("data:image/png;base64,")
    assert np.array_equal(decoded(png_uri(rgb_HW3)), rgb_HW3)
    photo = np.full((300, 900, 3), 200, np.uint8)
    assert decoded(thumbnail_uri(photo, longest=300)).shape == (100, 300, 3)
