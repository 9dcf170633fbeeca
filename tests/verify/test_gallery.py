from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from mobilesam.verify.gallery import Sample, Samples, build_gallery, worst_and_best
from mobilesam.verify.summary import PLACES

RNG = np.random.default_rng(0)


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


@pytest.mark.parametrize(
    ("cosines", "worst", "best"),
    [
        ([], [], []),
        ([0.5], [0], []),
        ([0.9, 0.1], [1], [0]),
        ([0.9, 0.1, 0.5], [1, 2], [0]),
        ([0.3, None, 0.1, float("nan"), 0.2], [2, 4], [0]),
        ([0.5, 0.5, 0.5, 0.5], [0, 1], [3, 2]),
    ],
)
def test_few_images_are_shared_between_worst_and_best(cosines, worst, best):
    assert worst_and_best(cosines) == (worst, best)


def test_of_many_images_the_worst_and_the_best_six_are_shown():
    cosines = list(RNG.permutation(100) / 100)
    worst, best = worst_and_best(cosines, count=6)
    assert [cosines[i] for i in worst] == [0, 0.01, 0.02, 0.03, 0.04, 0.05]
    assert [cosines[i] for i in best] == [0.99, 0.98, 0.97, 0.96, 0.95, 0.94]


def test_a_perfect_student_has_the_teachers_colours_and_a_black_error_map():
    valid_gg = np.zeros((16, 16), dtype=bool)
    valid_gg[:10] = True
    emb_CHW = RNG.normal(size=(32, 16, 16)).astype(np.float32)
    sample = Sample(
        key="a.jpg",
        photo_HWC=np.zeros((160, 256, 3), np.uint8),
        valid_gg=valid_gg,
        teacher_CHW=emb_CHW,
        student_CHW=emb_CHW,
        metrics={"cosine": 1.0, "cosine_valid": 1.0, "mse": 0.0, "mse_valid": 0.0},
    )
    gallery = build_gallery(Samples(worst=[sample], best=[], examples=dict.fromkeys(PLACES, sample)))
    assert gallery is not None
    (panel,) = gallery.worst
    assert panel.pictures["teacher"] == panel.pictures["student"]
    assert decoded(panel.pictures["error"]).max() <= 4  # magma begins at (0, 0, 3)
    assert panel.size == (160, 256)
    assert [example.place for example in gallery.examples] == [""]
    assert build_gallery(Samples(worst=[], best=[], examples={})) is None
