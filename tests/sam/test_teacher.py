from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor, sam_model_registry

from mobilesam.common.errors import CheckpointError, SamError
from mobilesam.sam.modeling.tiny_vit import TinyViT
from mobilesam.sam.registry import TEACHERS
from mobilesam.sam.teacher import Teacher, load_head, load_teacher

HEAD = ("prompt_encoder.", "mask_decoder.")


def pixels(image_size: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(5))


def test_vit_b_at_256_equals_segment_anythings_own_encoder(vit_b_file: Path) -> None:
    teacher = load_teacher("vit_b", vit_b_file, image_size=256)
    reference = sam_model_registry["vit_b"]().image_encoder.eval()
    saved = torch.load(vit_b_file, weights_only=True, mmap=True)
    reference.load_state_dict(
        {k.removeprefix("image_encoder."): v for k, v in saved.items() if k.startswith("image_encoder.")}
    )
    # The reference resamples relative positions by itself; its table of positions is given the same shape.
    table = reference.pos_embed.detach().permute(0, 3, 1, 2)
    table = torch.nn.functional.interpolate(table, (16, 16), mode="bicubic", antialias=True)
    reference.pos_embed = torch.nn.Parameter(table.permute(0, 2, 3, 1))
    x = pixels(256, batch=2)
    with torch.no_grad():
        wanted = reference(x)
    found = teacher.embed(x)
    assert found.shape == (2, 256, 16, 16)
    assert (found - wanted).abs().max() / (wanted.max() - wanted.min()) < 1e-5
    assert teacher.positions_interpolated
    assert teacher.checkpoint_sha256 == hashlib.sha256(vit_b_file.read_bytes()).hexdigest()


def predictor_embedding(name: str, checkpoint: Path, image_HWC: np.ndarray) -> torch.Tensor:
    """What ``SamPredictor.set_image`` gives, with weights loaded as its users load them."""
    sam = sam_model_registry[name]()
    sam.load_state_dict(torch.load(checkpoint, weights_only=True, mmap=True))
    predictor = SamPredictor(sam.eval())
    predictor.set_image(image_HWC)
    return predictor.get_image_embedding()


def parity_at_1024(
    name: str, checkpoint: Path, precision: str = "float32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and ``SamPredictor``'s embedding of one picture that needs padding but no resizing."""
    image_HWC = np.random.default_rng(2).integers(0, 256, (683, 1024, 3), dtype=np.uint8)
    wanted = predictor_embedding(name, checkpoint, image_HWC)
    mean = torch.tensor([123.675, 116.28, 103.53])
    std = torch.tensor([58.395, 57.12, 57.375])
    canvas_1CHW = torch.zeros(1, 3, 1024, 1024)
    canvas_1CHW[0, :, :683] = ((torch.from_numpy(image_HWC) - mean) / std).permute(2, 0, 1)
    teacher = load_teacher(name, checkpoint)
    assert not teacher.positions_interpolated
    return teacher.embed(canvas_1CHW), wanted


@pytest.mark.long
def test_vit_b_at_1024_equals_sam_predictor(vit_b_file: Path) -> None:
    found, wanted = parity_at_1024("vit_b", vit_b_file)
    assert (found - wanted).abs().max() / (wanted.max() - wanted.min()) < 1e-4


@pytest.mark.long  # minutes on a CPU that emulates bfloat16
def test_vit_b_in_bfloat16_keeps_each_cells_direction(vit_b_file: Path) -> None:
    x = pixels(256)
    wanted, found = (
        load_teacher("vit_b", vit_b_file, image_size=256, precision=precision).embed(x)
        for precision in ("float32", "bfloat16")
    )
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=1).mean() > 0.9999


@pytest.mark.long
@pytest.mark.parametrize("name", ["vit_l", "vit_h"])
def test_the_large_teachers_equal_sam_predictor(
    name: str, tmp_path: Path, filled: Callable[..., dict]
) -> None:
    torch.manual_seed(0)
    torch.save(filled(sam_model_registry[name]().state_dict()), tmp_path / "large.pth")
    found, wanted = parity_at_1024(name, tmp_path / "large.pth")
    assert (found - wanted).abs().max() / (wanted.max() - wanted.min()) < 1e-4


def test_mobile_sam_loads_with_its_classifier_left_out(mobile_sam_file: Path) -> None:
    teacher = load_teacher("mobile_sam", mobile_sam_file, image_size=256)
    saved = torch.load(mobile_sam_file, weights_only=True)
    reference = TinyViT(256).eval()
    reference.load_state_dict(
        {
            k.removeprefix("image_encoder."): v
            for k, v in saved.items()
            if "image_encoder" in k and "head" not in k
        }
    )
    x = pixels(256)
    with torch.no_grad():
        assert torch.equal(teacher.embed(x), reference(x))
    assert not teacher.positions_interpolated


def test_embeddings_are_float32_contiguous_and_free_of_gradients() -> None:
    teacher = load_teacher("vit_nano", None, image_size=256, precision="bfloat16")
    embedding = teacher.embed(pixels(256).requires_grad_())
    assert embedding.dtype == torch.float32
    assert embedding.is_contiguous()
    assert not embedding.requires_grad
    # A student's loss saves the target for its backward pass, which inference tensors refuse.
    student = torch.ones_like(embedding, requires_grad=True)
    (student * embedding).sum().backward()
    assert not any(parameter.requires_grad for parameter in teacher.image_encoder.parameters())
    assert not any(module.training for module in teacher.image_encoder.modules())


def test_bfloat16_stays_near_float32() -> None:
    x = pixels(256)
    exact, low = (
        load_teacher("vit_nano", None, image_size=256, precision=precision).embed(x)
        for precision in ("float32", "bfloat16")
    )
    assert not torch.equal(exact, low)
    assert torch.nn.functional.cosine_similarity(exact, low, dim=1).mean() > 0.9999


def test_half_precision_checkpoints_are_computed_with_in_float32(vit_b_file: Path, tmp_path: Path) -> None:
    saved = torch.load(vit_b_file, weights_only=True)
    torch.save({key: value.half() for key, value in saved.items()}, tmp_path / "half.pth")
    teacher = load_teacher("vit_b", tmp_path / "half.pth", image_size=64)
    assert {value.dtype for value in teacher.image_encoder.state_dict().values()} == {torch.float32}
    assert torch.isfinite(teacher.embed(pixels(64))).all()


def test_weights_are_the_files_own_mapping_and_not_a_copy(vit_b_file: Path) -> None:
    teacher = load_teacher("vit_b", vit_b_file, image_size=1024)
    mapped = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(vit_b_file)):
            start, end = (int(edge, 16) for edge in line.split()[0].split("-"))
            mapped += sum(
                parameter.numel() * 4
                for parameter in teacher.image_encoder.parameters()
                if start <= parameter.data_ptr() < end
            )
    assert mapped == TEACHERS["vit_b"].parameters * 4


def test_loading_leaves_the_callers_random_numbers_alone(mobile_sam_file: Path) -> None:
    torch.manual_seed(4)
    wanted = torch.rand(3)
    torch.manual_seed(4)
    load_teacher("mobile_sam", mobile_sam_file, image_size=256)
    load_teacher("vit_nano", None, image_size=256)
    assert torch.equal(torch.rand(3), wanted)


def test_a_known_digest_is_not_computed_again(mobile_sam_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilesam.sam.teacher.weights_sha256", lambda path: pytest.fail("read once more"))
    teacher = load_teacher("mobile_sam", mobile_sam_file, image_size=64, checkpoint_sha256="ab" * 32)
    assert teacher.checkpoint_sha256 == "ab" * 32


@pytest.mark.parametrize("which", ["vit_b", "mobile_sam"])
def test_the_head_is_the_checkpoints_own(which: str, vit_b_file: Path, mobile_sam_file: Path) -> None:
    path = {"vit_b": vit_b_file, "mobile_sam": mobile_sam_file}[which]
    saved = torch.load(path, weights_only=True)
    head = load_head(which, path)
    assert set(head) == {key for key in saved if key.startswith(HEAD)}
    assert all(torch.equal(head[key], saved[key]) for key in head)
    assert sum(value.numel() for value in head.values()) == 4_064_816


def test_pixels_of_another_size_are_refused_with_both_sizes() -> None:
    teacher = load_teacher("vit_nano", None, image_size=256)
    with pytest.raises(SamError, match=r"\(1, 3, 128, 128\).*\(B, 3, 256, 256\)"):
        teacher.embed(pixels(128))


@pytest.mark.parametrize("image_size", [0, 100, -16])
def test_an_image_size_that_is_no_multiple_of_16_is_refused(image_size: int) -> None:
    with pytest.raises(SamError, match="multiple of 16"):
        load_teacher("vit_nano", None, image_size=image_size)


def test_teachers_without_their_checkpoint_and_unknown_teachers_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"vit_h needs its checkpoint sam_vit_h_4b8939\.pth"):
        load_teacher("vit_h", None)
    with pytest.raises(SamError, match="unknown teacher 'vit_x'"):
        load_teacher("vit_x", None)
    with pytest.raises(CheckpointError, match="vit_nano is embedded"):
        load_head("vit_nano", Path("some.pth"))


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_gives_the_cpus_embedding(precision: str) -> None:
    x = pixels(256, batch=2)
    wanted = load_teacher("vit_nano", None, image_size=256).embed(x)
    teacher: Teacher = load_teacher("vit_nano", None, image_size=256, device="cuda", precision=precision)
    found = teacher.embed(x)
    assert found.device.type == "cuda"
    cosine = torch.nn.functional.cosine_similarity(found.cpu(), wanted, dim=1)
    assert cosine.mean() > 0.9999
