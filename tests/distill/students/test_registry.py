from __future__ import annotations

import pytest
import torch
from small_student import registered_small_student

from mobilesam.distill import STUDENTS, DistillError, build_student
from mobilesam.distill.students.registry import check_student_size


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


@pytest.mark.parametrize("size", [16, 32, 48, 64])
def test_every_registered_student_gives_the_same_grid_from_a_smaller_input(size: int) -> None:
    for name in STUDENTS:
        student = build_student(name, 64, 0, size).eval()
        with torch.no_grad():
            assert student(torch.zeros(1, 3, size, size)).shape == (1, 256, 4, 4)
            with pytest.raises(ValueError, match=rf"\(1, 3, 80, 80\).*\(B, 3, {size}, {size}\)"):
                student(torch.zeros(1, 3, 80, 80))


@pytest.mark.parametrize(
    ("size", "image_size", "wanted"),
    [(16, 128, "from 32 to 128"), (144, 128, "from 32 to 128"), (40, 128, "from 32"), (0, 128, "it is 0"),
     (64, 1024, "from 256 to 1024"), (32, 144, "from 48 to 144"), (64, 100, "image size must be")],
)  # fmt: skip
def test_a_size_that_cannot_be_is_refused_with_those_that_can(
    size: int, image_size: int, wanted: str
) -> None:
    with pytest.raises(DistillError, match=wanted):
        check_student_size(size, image_size)


def test_a_student_that_takes_the_whole_image_only_is_refused_a_smaller_one() -> None:
    with registered_small_student() as name:
        assert build_student(name, 64, seed=0)
        with pytest.raises(DistillError, match="small takes no inputs of another size than 64"):
            build_student(name, 64, 0, 32)
