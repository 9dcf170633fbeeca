"""A new teacher is one entry of the registry: all commands take it, and its checkpoint is known by its content."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from one_process import one_process_cluster, precompute_small
from PIL import Image
from small_student import registered_small_student

from mobilesam.common.errors import CheckpointError
from mobilesam.distill import DistillConfig, distill
from mobilesam.distill.students import cost
from mobilesam.distill.students.registry import outline_student, student_info
from mobilesam.sam.registry import TEACHERS, CheckpointFile, TeacherInfo
from mobilesam.sam.teacher import load_head, load_teacher, positions_interpolated, state_shapes
from mobilesam.sam.weights.checkpoint import ENCODER_PREFIX, identify_teacher, read_state
from mobilesam.store import EmbeddingStore
from mobilesam.verify import EvaluateConfig, VerifyConfig, evaluate_masks, verify
from mobilesam.verify.evaluate.models import outline_encoder

SMALL_VIT = {"width": 64, "depth": 3, "heads": 2, "global_blocks": (2,)}
SIDE = 64


def _entry(name: str, architecture: str, settings: Mapping[str, object], trained: int = 1024) -> TeacherInfo:
    file = CheckpointFile(name=f"{name}.pth", url=f"https://example.org/{name}.pth", bytes=1, sha256="0" * 64)
    return TeacherInfo(
        name=name, parameters=1, macs_at_1024=1e9, architecture=architecture, settings=settings,
        trained_image_size=trained, checkpoint=file,
    )  # fmt: skip


ENTRIES = {
    info.name: info
    for info in (
        _entry("mobile_sam_11m", "tiny_vit.TinyViTVariant", {"name": "11m"}),
        _entry("mobile_sam_21m", "tiny_vit.TinyViTVariant", {"name": "21m"}),
        _entry("small_vit", "vit.ViTConfig", SMALL_VIT, 256),
        # The same width and depth as small_vit.
        _entry("small_vit_more_heads", "vit.ViTConfig", SMALL_VIT | {"heads": 4}, 256),
        _entry("small_vit_more_global", "vit.ViTConfig", SMALL_VIT | {"global_blocks": (1, 2)}, 256),
        # The same encoders as other teachers', one of them trained with other images.
        _entry("small_vit_at_512", "vit.ViTConfig", SMALL_VIT, 512),
        _entry("mobile_sam_11m_again", "tiny_vit.TinyViTVariant", {"name": "11m"}),
    )
}


@pytest.fixture(autouse=True)
def _new_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, info in ENTRIES.items():
        monkeypatch.setitem(TEACHERS, name, info)  # type: ignore[arg-type]  # a dict, which its users only read


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    with one_process_cluster() as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six pictures of coarse noise, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((SIDE, SIDE - 8 * number)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """save(name) -> the teacher's checkpoint, with random weights and vit_nano's head."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def save_once(name: str) -> Path:
        info, path = ENTRIES[name], folder / f"{name}.pth"
        if not path.exists():
            torch.manual_seed(3)
            encoder = info.encoder.build(info.trained_image_size).state_dict()
            state = {ENCODER_PREFIX + key: value for key, value in encoder.items()}
            torch.save(state | load_head("vit_nano", None), path)
        return path

    return save_once


def _shapes(name: str) -> dict[str, torch.Tensor]:
    """Return a checkpoint of this teacher whose tensors share one number."""
    return {key: torch.zeros(()).expand(shape) for key, shape in state_shapes(TEACHERS[name]).items()}


@pytest.mark.parametrize("name", ["mobile_sam_11m", "small_vit"])
def test_a_new_teacher_goes_through_all_commands(
    name: str, photos: Path, scheduler: str, save: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint, store = save(name), tmp_path / "store.zarr"
    precompute_small(
        images=(photos,), out=store, teacher=name, checkpoint=checkpoint, image_size=SIDE, precision="float32",
        device="cpu", scheduler=scheduler, audit=1,
    )  # fmt: skip
    with EmbeddingStore.open(store) as opened:
        assert (opened.spec.teacher, opened.spec.positions_interpolated) == (name, name == "small_vit")
        stored = opened.read(range(6)).to_float32()
    assert stored.shape == (6, 256, 4, 4)
    assert np.isfinite(stored).all()
    assert stored.std() > 0
    with registered_small_student() as student:
        distill(
            DistillConfig(
                store=store, student=student, epochs=1, batch_size=2, val_fraction=0.4, device="cpu",
                out=tmp_path / "run",
            )
        )  # fmt: skip
        verified = verify(VerifyConfig(student=tmp_path / "run", split="all", points=1, device="cpu"))
    assert verified["subject"]["teacher"] == name
    assert 0 <= verified["miou"] <= 1
    compared = evaluate_masks(
        EvaluateConfig(
            models=(("mine", str(checkpoint)),), images=photos, teacher=name, checkpoint=checkpoint, image_size=SIDE,
            points=1, distances=(), limit=1, device="cpu",
        )
    )  # fmt: skip
    (model,) = compared["models"]
    assert (model["kind"], model["head"]) == (name, f"{name}'s own")
    assert model["teacher"]["point"]["miou"] == 1
    encoder = TEACHERS[name].encoder.build(SIDE)
    assert model["encoder_parameters"] == sum(parameter.numel() for parameter in encoder.parameters())


@pytest.mark.parametrize("name", [name for name in ENTRIES if not name.endswith("_again")])
def test_the_checkpoint_of_a_new_teacher_is_told_from_all_others(name: str, tmp_path: Path) -> None:
    assert identify_teacher(_shapes(name)) == name
    torch.save(_shapes(name), tmp_path / "some.pth")
    same = {other for other, info in TEACHERS.items() if info.settings == ENTRIES[name].settings}
    for other in sorted({"vit_b", "mobile_sam", *ENTRIES} - same):
        with pytest.raises(
            CheckpointError, match=f"is a {name} checkpoint, not {other}; use --teacher {name}"
        ):
            load_teacher(other, tmp_path / "some.pth", image_size=SIDE)


def test_the_present_teachers_checkpoints_keep_their_names_beside_new_ones() -> None:
    for name in ("vit_h", "vit_l", "vit_b", "mobile_sam", "vit_nano"):
        assert identify_teacher(_shapes(name)) == name


def test_two_teachers_may_have_the_same_encoder(save: Callable[[str], Path]) -> None:
    path = save("mobile_sam_11m")
    assert identify_teacher(read_state(path)) == "mobile_sam_11m"
    first, second = (
        load_teacher(name, path, image_size=SIDE) for name in ("mobile_sam_11m", "mobile_sam_11m_again")
    )
    pixels = torch.ones(1, 3, SIDE, SIDE)
    assert torch.equal(first.embed(pixels), second.embed(pixels))
    smaller = load_teacher("small_vit_at_512", save("small_vit"), image_size=256)
    assert not smaller.positions_interpolated
    assert smaller.note is not None
    assert "trained at 256 pixels: --image-size 256 uses its positions unchanged" in smaller.note


def test_a_new_teachers_costs_are_its_own_encoders() -> None:
    assert cost.count_macs(outline_encoder("mobile_sam_11m", SIDE), SIDE) == cost.count_macs(
        outline_student(student_info("tiny_vit_11m"), SIDE), SIDE
    )
    outline = outline_encoder("small_vit", SIDE)
    built = TEACHERS["small_vit"].encoder.build(SIDE)
    assert {key: value.shape for key, value in outline.state_dict().items()} == {
        key: value.shape for key, value in built.state_dict().items()
    }


@pytest.mark.parametrize("name", ["mobile_sam_11m", "small_vit"])
def test_a_new_teacher_in_bfloat16_stays_near_float32(name: str, save: Callable[[str], Path]) -> None:
    path = save(name)
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    exact, low = (
        load_teacher(name, path, image_size=SIDE, precision=precision)
        for precision in ("float32", "bfloat16")
    )
    held = {parameter.dtype for parameter in low.image_encoder.parameters()}
    assert (torch.bfloat16 in held) == (name == "small_vit")
    found, wanted = low.embed(pixels), exact.embed(pixels)
    assert not torch.equal(found, wanted)
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=1).mean() > 0.999
    assert positions_interpolated(name, SIDE) == (name == "small_vit")
