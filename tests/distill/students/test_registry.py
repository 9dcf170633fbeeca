from __future__ import annotations

import pytest
import torch

from mobilesam.distill import STUDENTS, DistillError, build_student


def test_the_seed_alone_decides_the_initial_weights_and_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    first = build_student("tiny_vit", 64, seed=0)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(7)
    second, other = build_student("tiny_vit", 64, seed=0), build_student("tiny_vit", 64, seed=1)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    differs = [not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)]
    assert any(differs)


def test_every_registered_student_gives_the_grid_of_embeddings() -> None:
    for name in STUDENTS:
        student = build_student(name, 64, seed=0).eval()
        with torch.no_grad():
            assert student(torch.zeros(1, 3, 64, 64)).shape == (1, 256, 4, 4)


def test_an_unknown_student_is_refused_with_the_list() -> None:
    with pytest.raises(DistillError, match="tiny_vit"):
        build_student("giant_vit", 64, seed=0)
