"""timm's networks as students."""

from __future__ import annotations

import copy
import functools
import hashlib
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mobilesam.distill import DistillConfig, DistillError, build_student, distill, load_student, student_info
from mobilesam.distill.students.backbones import TimmStudent

timm = pytest.importorskip("timm")

Options = Callable[..., DistillConfig]
# One of each wrapper of timm's, and one that gives channels last.
BACKBONES = [
    "resnet18",
    "mobilenetv3_small_100",
    "convnext_atto",
    "tiny_vit_5m_224",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
]
STUDENTS = ["deit_tiny", *(f"timm:{name}" for name in BACKBONES)]


def embedding(student: nn.Module, image_size: int) -> torch.Tensor:
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = student(pixels)
    return found


@pytest.fixture(scope="module")
def built() -> Callable[[str], nn.Module]:
    """built(name) -> a student for 64 pixels of seed 0, to be changed: drawing its weights takes longest here, and is
    done once."""
    once = functools.cache(lambda name: build_student(name, 64, seed=0))
    return lambda name: copy.deepcopy(once(name))


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("image_size", [64, 112])
def test_the_embedding_has_a_sixteenth_of_the_image_as_grid(
    name: str, image_size: int, built: Callable[[str], nn.Module]
) -> None:
    student = (built(name) if image_size == 64 else build_student(name, image_size, seed=0)).eval()
    assert embedding(student, image_size).shape == (1, 256, image_size // 16, image_size // 16)


@pytest.mark.parametrize("name", ["deit_tiny", "timm:resnet18"])
def test_at_1024_pixels_the_grid_is_64(name: str) -> None:
    assert embedding(build_student(name, 1024, seed=0).eval(), 1024).shape == (1, 256, 64, 64)


@pytest.mark.parametrize("name", STUDENTS)
def test_every_parameter_learns_and_nothing_is_dropped_at_random(
    name: str, built: Callable[[str], nn.Module]
) -> None:
    student = built(name).train()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    first = student(pixels)
    first.square().mean().backward()
    assert torch.equal(student(pixels), first)
    # Batch norms give biases before them no gradient but rounding; what is never reached has none at all.
    unreached = [key for key, parameter in student.named_parameters() if parameter.grad is None]
    assert not unreached


def test_a_recipes_stochastic_depth_is_disabled() -> None:
    dropping = [m for m in timm.models.tiny_vit_21m_224().modules() if getattr(m, "drop_prob", 0)]
    assert dropping
    student = build_student("timm:tiny_vit_21m_224", 64, seed=0)
    assert not [m for m in student.modules() if getattr(m, "drop_prob", 0)]
    assert not [m for m in student.modules() if isinstance(m, nn.Dropout) and m.p]


@pytest.mark.parametrize("name", STUDENTS)
def test_the_seed_alone_decides_the_weights(name: str, built: Callable[[str], nn.Module]) -> None:
    first = built(name).state_dict()
    torch.manual_seed(5)
    second, other = build_student(name, 64, seed=0).state_dict(), build_student(name, 64, seed=2).state_dict()
    assert all(torch.equal(second[key], value) for key, value in first.items())
    assert any(not torch.equal(other[key], value) for key, value in first.items())


def test_the_maps_of_both_strides_are_projected_resized_to_one_grid_and_summed(
    built: Callable[[str], nn.Module],
) -> None:
    student = built("timm:resnet18").eval()
    assert isinstance(student, TimmStudent)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        fine, coarse = student.backbone(pixels)
        assert (fine.shape, coarse.shape) == ((1, 256, 4, 4), (1, 512, 2, 2))
        # A projection without bias and bilinear interpolation change places.
        upsampled = nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        weights = [lateral.weight for lateral in student.laterals.values()]
        joined = nn.functional.conv2d(torch.cat([fine, upsampled], 1), torch.cat(weights, 1))
        torch.testing.assert_close(student(pixels), student.neck(joined), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "strides"),
    [(64, ["16", "32"]), (48, ["8", "16", "32"]), (32, ["8", "16", "32"]), (16, ["4", "8", "16", "32"])],
)
def test_a_smaller_input_adds_the_maps_of_the_grids_resolution(size: int, strides: list[str]) -> None:
    student = build_student("timm:resnet18", 64, 0, size).eval()
    assert isinstance(student, TimmStudent)
    assert list(student.laterals) == strides
    found = student.backbone(torch.zeros(1, 3, size, size))
    assert found[0].shape[-1] >= 64 // 16
    assert len(found) == len(strides)


def test_a_channels_last_map_of_timm_is_permuted(built: Callable[[str], nn.Module]) -> None:
    student = built("timm:swin_tiny_patch4_window7_224")
    assert isinstance(student, TimmStudent)
    assert student.channels_last
    assert student.backbone(torch.zeros(1, 3, 64, 64))[0].shape == (1, 4, 4, 384)


def test_deit_has_no_class_token_and_a_position_for_each_cell() -> None:
    state = build_student("deit_tiny", 128, seed=0).state_dict()
    assert state["backbone.pos_embed"].shape == (1, 64, 192)
    assert not any("token" in key for key in state)


@pytest.mark.parametrize("name", STUDENTS)
def test_pixels_of_another_size_are_refused_with_both_sizes(
    name: str, built: Callable[[str], nn.Module]
) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 96, 96\).*64"):
        built(name)(torch.zeros(1, 3, 96, 96))


@pytest.mark.parametrize("name", ["deit_tiny", "timm:resnet18"])
@pytest.mark.parametrize("image_size", [0, -16, 100])
def test_an_image_size_that_is_no_multiple_of_16_is_refused(name: str, image_size: int) -> None:
    with pytest.raises(DistillError, match=f"{image_size}"):
        build_student(name, image_size, seed=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet19", "similar: .*resnet18"),
        ("timm:", "not a name in timm's list"),
        ("timm:hf-hub:timm/resnet18.a1_in1k", "not a name in timm's list"),
        ("timm:hf_hub:timm/resnet18", "not a name in timm's list"),
        ("timm:local-dir:/tmp/model", "not a name in timm's list"),
        ("timm:../resnet18", "not a name in timm's list"),
        ("timm:resnet18\n", "not a name in timm's list"),
        ("timm:resnet18.a1_in1k", "give timm:resnet18"),
        ("timm:vit_small_patch14_dinov2", "stride 14; a student needs one of stride 16 or 32"),
        ("timm:efficientformer_l1", "can't be a student of 64 x 64 pixels"),
        ("tiny_vitt", "did you mean tiny_vit"),
    ],
)
def test_networks_unfit_as_students_are_refused_without_a_connection(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(DistillError, match=message) as caught:
        build_student(name, 64, seed=0)
    assert len(str(caught.value)) < 400


def test_a_long_name_makes_a_short_error() -> None:
    with pytest.raises(DistillError) as caught:
        student_info("timm:" + "r" * 100_000)
    assert len(str(caught.value)) < 400


def test_a_network_registered_by_others_under_timms_name_is_not_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def theirs(**_: Any) -> nn.Module:
        raise AssertionError("not timm's")

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "resnet18", theirs)
    assert isinstance(build_student("timm:resnet18", 64, seed=0), TimmStudent)


@pytest.mark.parametrize("name", ["deit_tiny", "timm:resnet18"])
def test_without_timm_the_error_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DistillError, match=r"pip install 'mobilesam\[students\]'"):
        build_student(name, 64, seed=0)


def test_tiny_vit_needs_no_timm() -> None:
    program = (
        "import sys; sys.modules['timm'] = None\n"
        "from mobilesam.distill import build_student, student_info\n"
        "build_student('tiny_vit', 64, seed=0)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_run_of_each_kind_rebuilds_its_student_which_computes_the_same(
    store: Path, options: Options
) -> None:
    hashes, folders = set(), set()
    for name in ("tiny_vit", "deit_tiny", "timm:resnet18"):
        result = distill(options(store, student=name, epochs=1))
        folder = Path(result["run"])
        folders.add(folder.name)
        assert folder.name.startswith(name.replace(":", "-") + "-")
        hashes.add(hashlib.sha256((folder / "student.safetensors").read_bytes()).hexdigest())
        first, info = load_student(folder)
        second, _ = load_student(folder)
        assert info["student"] == name
        fresh = build_student(name, 64, seed=0).eval()
        assert torch.equal(embedding(first, 64), embedding(second, 64))
        fresh.load_state_dict(first.state_dict())
        assert torch.equal(embedding(first, 64), embedding(fresh, 64))
        assert result["val"]["mse"] > 0
        assert distill(options(store, student=name, epochs=1)) == {**result, "already_finished": True}
    assert len(hashes) == len(folders) == 3


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_of_each_kind_learns_one_batch(name: str, built: Callable[[str], nn.Module]) -> None:
    student = built(name).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    target = torch.randn(2, 256, 4, 4, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(8):
        loss = (student(pixels) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
